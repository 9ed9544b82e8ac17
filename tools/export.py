"""Export the encoder: weights with torchvision's names, safetensors, an ONNX graph, or embeddings
of any folder.
"""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import emp_ssl
from experiment import Run, position
from hparams import SETTINGS
from images.folders import find_images, log_left_out
from infra import files
from infra.console import log
from infra.distributed import on_main_process, process_group
from infra.errors import UsageError
from model import fold_batch_norm, stages_of
from tools import loading
from weights import build_encoder

PACKAGES = {"torchvision": (), "safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript")}
EXTENSIONS = {"torchvision": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


def add_export(commands):
    """Add the command export."""
    parser = commands.add_parser(
        "export",
        help="write the encoder for torchvision, safetensors or ONNX",
        description="Write the encoder into the run folder's export/, with code that loads it and "
        "a JSON file that describes its use.",
    )
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    parser.add_argument(
        "--format", required=True, choices=tuple(EXTENSIONS), help="torchvision: a state dict"
    )
    parser.add_argument(
        "--head", action="store_true", help="with the feature layer, whose output the probe sees"
    )
    parser.set_defaults(command=export_command)


def add_embed(commands):
    """Add the command embed."""
    parser = commands.add_parser(
        "embed",
        help="the embeddings of any folder of images",
        description="Encode all images below a folder, by the views of the run, and write their "
        "embeddings and paths into an .npz file.",
    )
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    parser.add_argument(
        "--images", required=True, type=Path, metavar="FOLDER", help="folder of images, any tree"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE.npz",
        help="embeddings (N, d) and paths (N,)",
    )
    parser.add_argument("--device", default="auto", help=SETTINGS["device"].help)
    parser.set_defaults(command=embed_command)


def export_command(args):
    """Write the encoder into the run folder's export/."""
    missing = [name for name in PACKAGES[args.format] if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(PACKAGES[args.format])
        raise UsageError(f"--format {args.format} needs {names}: pip install {names}")
    run = Run(args.exp_dir).load("cpu")
    encoder = build_encoder(run)
    description = describe(run, encoder, args.head)
    for path in write(args.format, network(encoder, args.head), description, run.export):
        log.info(f"* Wrote {path}")


def network(encoder, head):
    """Return a copy of the backbone, float32 on the CPU: (N, 3, S, S) -> (N, dim).

    head: with the feature layer, nn.Sequential(Linear, BatchNorm1d, activation), so dim is h_dim.
    It is the layer fc of a resnet of torchvision, whose fc is the identity otherwise; of a model of
    timm it is the second of two modules.
    """
    encoder = copy.deepcopy(encoder).cpu()
    if stages_of(encoder.backbone):
        encoder.backbone.fc = encoder.features if head else nn.Identity()
        return encoder.backbone
    return nn.Sequential(encoder.backbone, encoder.features) if head else encoder.backbone


def describe(run, encoder, head):
    """Return what one must know to use the network, as a dict of plain values."""
    hp = run.hp
    image_size = hp.image_size if hp.dataset == "folder" else 32
    epoch, step = position(run.checkpoint)
    return {
        "arch": hp.arch,
        "head": {"h_dim": hp.h_dim, "batch_norm": hp.batch_norm, "activation": hp.activation}
        if head
        else None,
        "features": encoder.features[0].in_features,
        "dim": hp.h_dim if head else encoder.features[0].in_features,
        "input_size": hp.patch_size,
        "image_size": image_size,
        "normalisation": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },  # of pixels in [0, 1]: the network sees [-1, 1]
        "patches": "half as wide as the image, resized to input_size",
        "views": {"kind": hp.eval_views, "n": hp.test_views.count},
        "class_names": run.fingerprints["class_names"],
        "epoch": epoch,
        "step": step,
    }


def write(kind, module, description, folder):
    """Write the network in a format, and beside it the code that loads it and its description.

    Return the three paths.
    """
    folder.mkdir(exist_ok=True)
    path = (folder / ("encoder" if description["head"] else "backbone")).with_suffix(
        EXTENSIONS[kind]
    )
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    with files.atomic_write(path) as file:
        if kind == "torchvision":
            torch.save(weights, file)
        elif kind == "safetensors":
            import safetensors.torch

            file.write(
                safetensors.torch.save(
                    weights, {"format": "pt", "description": json.dumps(description)}
                )
            )
        else:
            file.write(onnx_graph(module, description["input_size"]))
    code = path.with_name(f"{path.stem}_{kind}.py")
    with files.atomic_write(code) as file:
        file.write(loading.code(kind, path.name, description).encode())
    files.write_json(path.with_suffix(".json"), description)
    return path, code, path.with_suffix(".json")


def onnx_graph(module, size):
    """Return the bytes of an ONNX file: images float32 (N, 3, size, size) -> features (N, dim), for
    any N.
    """
    program = torch.onnx.export(
        fold_batch_norm(module).to(memory_format=torch.contiguous_format),
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def embed_command(args):
    """Write embeddings float32 (N, d) and paths (N,), relative to the folder, of all images that
    can be read.
    """
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        raise UsageError(f"out {args.out} must be a file NAME.npz in a folder that exists")
    if not args.images.is_dir():
        raise UsageError(f"images {args.images} is not a folder")
    log_left_out(args.images)
    paths = find_images(args.images)
    embedder = emp_ssl.load(args.exp_dir, args.device)
    device = embedder.run.device
    with process_group(device):
        embeddings, readable = embedder.embed(paths)
    names = [str(path.relative_to(args.images)) for path in readable]
    write_npz(args.out, embeddings=embeddings.numpy(), paths=np.array(names))
    log.info(
        f"* Wrote {args.out}: embeddings {tuple(embeddings.shape)}, paths ({len(names)},), "
        f"device: {device}"
    )


@on_main_process
def write_npz(path, **arrays):
    """Write NumPy arrays by name, atomically."""
    with files.atomic_write(path) as file:
        np.savez(file, **arrays)
