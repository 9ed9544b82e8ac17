"""Export the encoder for torchvision, safetensors or ONNX."""

import copy
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from data import why_no_probe
from encode import dims_of
from experiment import Run, load_if_key, position
from images import pixels
from infra import files
from infra.console import log
from infra.errors import UsageError
from model import BACKBONES, TIMM, create_timm_model, fold_batch_norm, stages_of
from patches import resize_matrix
from tools import load
from weights import build_encoder

# Of each format: the packages that writing needs beside torch.
PACKAGES = {"torchvision": (), "safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript")}
# What each network that can be exported returns.
OUTPUTS = {
    "backbone": "features",
    "encoder": "features",
    "representation": "representation",
    "classifier": "logits",
}
# The suffix of the file of each format.
EXTENSIONS = {"torchvision": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


def add_export(commands):
    """Add the command export."""
    parser = commands.add_parser(
        "export",
        help="write the encoder for torchvision, safetensors or ONNX",
        description="Write the backbone, or what is given beside --format, into a folder, "
        "with code that loads it and a JSON file that describes its use.",
    )
    parser.add_argument("--exp_dir", required=True, type=files.user_path, help="the run folder")
    parser.add_argument(
        "--format", required=True, choices=tuple(EXTENSIONS), help="torchvision: a state dict"
    )
    parser.add_argument(
        "--out",
        type=files.user_path,
        metavar="FOLDER",
        help="where to write (default: export/ in the run folder)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--head", action="store_true", help="the backbone with the feature layer")
    part.add_argument(
        "--representation",
        action="store_true",
        help="from a whole image to what represents it in the run; with --eval_views whole",
    )
    part.add_argument(
        "--classifier", action="store_true", help="the same with the linear probe, to class logits"
    )
    parser.set_defaults(command=export_command)


def export_command(args):
    """Write the encoder into a folder, by default the run folder's export/."""
    missing = [name for name in PACKAGES[args.format] if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(PACKAGES[args.format])
        raise UsageError(f"--format {args.format} needs {names}: pip install {names}")
    run = Run(args.exp_dir).load("cpu")
    encoder = build_encoder(run)
    part = exported_part(args)
    description = describe(run, encoder, args.format, part)
    if part in ("representation", "classifier"):
        network = representation_network(run, encoder, description)
    else:
        network = exported_network(encoder, args.head)
    folder = args.out or run.export
    folder.mkdir(parents=True, exist_ok=True)
    for path in write(network, description, folder):
        log.info(f"* Wrote {path}")


def exported_part(args):
    """Return what is exported, a key of OUTPUTS."""
    if args.head:
        return "encoder"
    if args.representation:
        return "representation"
    return "classifier" if args.classifier else "backbone"


def exported_network(encoder, head):
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


def representation_network(run, encoder, description):
    """Return the network from a whole image to its representation, or to the logits of the probe.

    float32 on the CPU. Raises UsageError if the run has no probe for them.
    """
    encoder = copy.deepcopy(encoder).cpu()
    how = description["representation"]
    head = encoder.features if description["head"] else nn.Identity()
    network = load.build_representation(encoder.backbone, head, how)
    network.resize.copy_(resize_matrix(how["image_size"], how["side"], torch.device("cpu")))
    if how["n_classes"]:
        probe = load_if_key(run.probe, run.key("probe"))
        if probe is None:
            raise UsageError(f"{run.dir} has no linear probe of these settings: resume it first")
        network.probe.load_state_dict({name: probe[name] for name in ("weight", "bias")})
    return network


def describe(run, encoder, format, part):
    """Return what load.py and a reader must know of the network, as a dict of plain values.

    part: a key of OUTPUTS.
    """
    hp = run.hp
    n_features = encoder.features[0].in_features
    epoch, step = position(run.checkpoint)
    layer = {"h_dim": hp.h_dim, "batch_norm": hp.batch_norm, "activation": hp.activation}
    representation = None
    if part in ("representation", "classifier"):
        representation = describe_representation(run, encoder, part)
    with_head = part == "encoder" or (representation and hp.emb_pool == "features")
    dim = hp.h_dim if with_head else n_features
    if representation:
        dim = representation["n_classes"] or representation["dim"]
    return {
        "format": format,
        "file": part + EXTENSIONS[format],
        "output": OUTPUTS[part],
        "arch": hp.arch,
        "network": describe_backbone(hp),
        "head": layer if with_head else None,
        "representation": representation,
        "features": n_features,
        "dim": dim,
        "input_size": hp.image_size if representation else hp.patch_size,
        **hp.decoding._asdict(),
        # Of pixels in [0, 1]: the network sees [-1, 1].
        "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "patches": None if representation else "half as wide as the image, resized to input_size",
        "views": {"kind": hp.eval_views, "n": hp.test_views.count},
        "class_names": run.fingerprints["class_names"],
        "epoch": epoch,
        "step": step,
    }


def describe_representation(run, encoder, part):
    """Return what load.build_representation takes, beside the backbone and the head.

    Raises UsageError if one pass of a network can't express the representation of the run.
    """
    hp = run.hp
    if hp.eval_views != "whole":
        raise UsageError(
            f"--{part} needs a run that encodes whole images, and {run.dir} has eval_views "
            f"{hp.eval_views}: resume it with --eval_views whole, or use embed"
        )
    if hp.emb_pool == "proj":
        raise UsageError(f"--{part} can't be the projection: resume with another --emb_pool")
    class_names = run.fingerprints["class_names"]
    missing = why_no_probe(class_names, "test" in run.splits)
    if part == "classifier" and missing:
        raise UsageError(f"--classifier needs the linear probe, which {run.dir} has not: {missing}")
    return {
        "emb_pool": hp.emb_pool,
        "pool_grid": hp.pool_grid,
        "mirror": hp.mirror,
        "image_size": hp.image_size,
        "side": hp.test_views.side,
        "dim": hp.pool_grid**2 * dims_of(encoder)[hp.emb_pool],
        "n_classes": len(class_names) if part == "classifier" else None,
    }


def describe_backbone(hp):
    """Return how torchvision or timm builds the backbone, as a dict of plain values."""
    if hp.arch.startswith(TIMM):
        name = hp.arch.removeprefix(TIMM)
        _, options = create_timm_model(name, hp.patch_size)
        return {"library": "timm", "name": name, "options": options}
    build, _ = BACKBONES[hp.arch]  # a functools.partial of model.resnet
    (resnet,) = build.args
    return {"library": "torchvision", "name": resnet.__name__, "removed": (), **build.keywords}


def write(network, description, folder):
    """Write the network, and beside it the code that loads it and a JSON file with the description.

    Return the three paths. Both are named after the network and its format, so that several formats
    can be in the folder.
    """
    path = folder / description["file"]
    code = path.with_name(f"{path.stem}_{description['format']}.py")
    with files.atomic_write(path) as file:
        write_network(file, network, description)
    with files.atomic_write(code) as file:
        file.write(code_that_stands_alone().encode())
    files.write_json(code.with_suffix(".json"), description)
    return path, code, code.with_suffix(".json")


def code_that_stands_alone():
    """Return load.py with images/pixels.py in the place of its import."""
    code = Path(load.__file__).read_text()
    _, _, imported = Path(pixels.__file__).read_text().split('"""', 2)  # all but its docstring
    return code.replace("\nfrom images.pixels import read_image\n", imported)


def write_network(file, network, description):
    """Write the network in its format into an open file."""
    if description["format"] == "onnx":
        file.write(onnx_graph(network, description))
        return
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if description["format"] == "safetensors":
        import safetensors.torch

        metadata = {"format": "pt", "description": json.dumps(description)}
        file.write(safetensors.torch.save(weights, metadata))
    else:
        torch.save(weights, file)


def onnx_graph(network, description):
    """Return the bytes of an ONNX file: images (N, 3, S, S) -> outputs (N, dim), for any N.

    S is the description's input_size. Both are float32.
    """
    size = description["input_size"]
    program = torch.onnx.export(
        fold_batch_norm(network).to(memory_format=torch.contiguous_format),
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=["images"],
        output_names=[description["output"]],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    return program.model_proto.SerializeToString()
