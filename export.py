"""Taking the encoder away: its weights under torchvision's names, as safetensors, or as an ONNX graph."""

import copy
import importlib.util
import json

import torch
from torch import nn

import data
import experiment
from experiment import UsageError
from model import ARCHS, fold_batch_norm

PACKAGES = {"torchvision": (), "safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript")}
SUFFIXES = {"torchvision": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


def require_packages(kind):
    """Raises UsageError, with the command that installs them, if the format's packages are not there."""
    if not all(importlib.util.find_spec(name) for name in PACKAGES[kind]):
        names = " ".join(PACKAGES[kind])
        raise UsageError(f"--format {kind} needs {names}: pip install {names}")


def network(encoder, head):
    """A copy of the backbone of a model.Encoder as a torchvision resnet, float32 on the CPU: (N, 3, S, S) -> (N, dim).

    head: its last layer, fc, is the feature layer, nn.Sequential(Linear, BatchNorm1d, activation), so that dim is h_dim;
    else there is none.
    """
    encoder = copy.deepcopy(encoder).cpu()
    encoder.backbone.fc = encoder.features if head else nn.Identity()
    return encoder.backbone


def describe(hp, checkpoint, head):
    """What one must know to use the network: a dict of plain values."""
    image_size = hp.image_size if hp.dataset == "folder" else 32
    dim = hp.h_dim if head else ARCHS[hp.arch][2]
    return {
        "arch": hp.arch,
        "head": {"h_dim": hp.h_dim, "batch_norm": hp.batch_norm, "activation": hp.activation} if head else None,
        "dim": dim,
        "input_size": hp.input_size or image_size,
        "image_size": image_size,
        "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},  # of pixels in [0, 1]: the network sees [-1, 1]
        "patches": "half as wide as the image, resized to input_size",
        "views": {"kind": hp.eval_views, "n": data.count_views(hp.test_patches or hp.n_patches, hp.eval_views)},
        "class_names": checkpoint["data"]["class_names"],
        "epoch": checkpoint["epoch"],
        "step": checkpoint["step"],
    }


def write(kind, encoder, head, description, folder):
    """Write the network in the format and its description beside it; returns the two paths. Whole or not at all."""
    folder.mkdir(exist_ok=True)
    path = (folder / ("encoder" if head else "backbone")).with_suffix(SUFFIXES[kind])
    module = network(encoder, head)
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    with experiment.replacing(path) as file:
        if kind == "torchvision":
            torch.save(weights, file)
        elif kind == "safetensors":
            import safetensors.torch

            metadata = {"format": "pt", "description": json.dumps(description)}
            file.write(safetensors.torch.save(weights, metadata))
        else:
            file.write(onnx_graph(module, description["input_size"]))
    experiment.write_json(path.with_suffix(".json"), description)
    return path, path.with_suffix(".json")


def onnx_graph(module, size):
    """The bytes of an ONNX file: images float32 (N, 3, size, size) -> features (N, dim), for any N."""
    program = torch.onnx.export(
        fold_batch_norm(module).to(memory_format=torch.contiguous_format), (torch.zeros(2, 3, size, size),), dynamo=True,
        input_names=["images"], output_names=["features"], dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False,
    )  # fmt: skip
    return program.model_proto.SerializeToString()
