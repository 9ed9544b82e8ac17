"""The code that loads an exported network, as a Python file without this program.

It needs torchvision, timm or onnxruntime.
"""

from model import BACKBONES, TIMM, create_timm_model

PROGRAM = '''"""Load {file}. `python {name}.py IMAGE ...` prints the features of images."""

import sys
from pathlib import Path

import numpy as np
{imports}
from PIL import Image

FILE = Path(__file__).with_name("{file}")


def load():
    """Return the network: images float32 (N, 3, {size}, {size}) in [-1, 1] -> features (N, {dim})."""
{load}

def read(path):
    """Return an image file as input of the network, NumPy float32 (1, 3, {size}, {size}): its middle, resized."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize(({size}, {size}), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1  # (H, W, 3) -> (1, 3, H, W)


if __name__ == "__main__":
    network = load()
    for path in sys.argv[1:]:
        print(path, {call})
'''


def code(kind, file, description):
    """Return the code for a file of an export. kind: a key of export.EXTENSIONS. description: what
    export.describe returns.
    """
    size, dim = description["input_size"], description["dim"]
    name = f"{file.partition('.')[0]}_{kind}"
    if kind == "onnx":
        load = [
            "session = onnxruntime.InferenceSession(FILE)",
            'return lambda x: session.run(["features"], {"images": x})[0]',
        ]
        imports, call = ["import onnxruntime"], "*network(read(path))"
    else:
        imports, load = torch_code(kind, description)
        call = "*network(torch.from_numpy(read(path))).tolist()"
    lines = "".join(f"    {line}\n" for line in load)
    return PROGRAM.format(
        file=file, name=name, imports="\n".join(imports), size=size, dim=dim, load=lines, call=call
    )


def torch_code(kind, description):
    """Return (imports, lines) that build the network and load its weights."""
    arch, head = description["arch"], head_code(description)
    imports = ["import torch"]
    if arch.startswith(TIMM):
        imports.append("import timm")
        name = arch.removeprefix(TIMM)
        options = "".join(
            f", {option}={value}"
            for option, value in create_timm_model(name, description["input_size"])[1].items()
        )
        lines = [f'model = timm.create_model("{name}", num_classes=0{options})']
        lines += [f"model = torch.nn.Sequential(model, {head})"] if head else []
    else:
        imports.append("import torchvision")
        lines = resnet_lines(arch, head)
    if kind == "safetensors":
        imports.append("import safetensors.torch")
        weights = "safetensors.torch.load_file(FILE)"
    else:
        weights = "torch.load(FILE, weights_only=True)"
    return sorted(imports), [
        *lines,
        f"model.load_state_dict({weights})",
        "return model.eval().requires_grad_(False)",
    ]


def resnet_lines(arch, head):
    """Return the lines that build a resnet of torchvision as backbones.resnet does."""
    build, _ = BACKBONES[arch]
    (resnet,) = build.args
    lines = [f"model = torchvision.models.{resnet.__name__}()"]
    if build.keywords["small_stem"]:
        lines += [
            "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    lines += [f"model.{name} = torch.nn.Identity()" for name in build.keywords.get("removed", ())]
    return [*lines, f"model.fc = {head or 'torch.nn.Identity()'}"]


def head_code(description):
    """Return the expression of the feature layer, "" if it was not exported."""
    head = description["head"]
    if not head:
        return ""
    norm = f"torch.nn.BatchNorm1d({head['h_dim']}), " if head["batch_norm"] else ""
    activation = {"relu": "ReLU", "tanh": "Tanh"}[head["activation"]]
    return f"torch.nn.Sequential(torch.nn.Linear({description['features']}, {head['h_dim']}), {norm}torch.nn.{activation}())"
