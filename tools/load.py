"""Load the exported network that the JSON file of the same name describes.

`python FILE.py IMAGE ...` prints the features of images. It needs NumPy and Pillow; for an ONNX
file onnxruntime, else torch with torchvision or timm.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def load():
    """Return the network: float32 (N, 3, S, S) in [-1, 1] -> features float32 (N, dim).

    The JSON file has S, input_size, and dim. A network in an ONNX file takes and returns NumPy
    arrays, others are a torch.nn.Module.
    """
    description = read_description()
    path = Path(__file__).with_name(description["file"])
    if description["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return lambda x: session.run(["features"], {"images": x})[0]
    if description["format"] == "safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        import torch

        weights = torch.load(path, weights_only=True)
    network = build_network(description)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def build_network(description):
    """Return the network with random weights."""
    from torch import nn

    head = nn.Identity()
    feature_layer = description["head"]
    if feature_layer:
        h_dim = feature_layer["h_dim"]
        norm = [nn.BatchNorm1d(h_dim)] if feature_layer["batch_norm"] else []
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[feature_layer["activation"]]
        head = nn.Sequential(nn.Linear(description["features"], h_dim), *norm, activation())
    network = description["network"]
    if network["library"] == "timm":
        import timm

        model = timm.create_model(network["name"], num_classes=0, **network["options"])
        return nn.Sequential(model, head) if feature_layer else model
    import torchvision

    model = torchvision.models.get_model(network["name"])
    if network["small_stem"]:
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    for name in network["removed"]:
        setattr(model, name, nn.Identity())
    model.fc = head
    return model


def read(path):
    """Return an image file as input of the network, NumPy float32 (1, 3, S, S).

    The whole image: turned by its EXIF, its shorter side resized to image_size, centre-cropped,
    then resized to S. Raises ValueError for floating-point pixels.
    """
    description = read_description()
    side = description["image_size"]
    S = description["input_size"]
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode == "F":
        raise ValueError(f"{path} has floating-point pixels, which have no range")
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    image = image.resize((S, S), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1  # (S, S, 3) -> ...


def read_description():
    """Return the content of the JSON file."""
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def print_features(paths):
    """Print a line for each image file: its path and its features."""
    network = load()
    for path in paths:
        x = read(path)
        if read_description()["format"] != "onnx":
            import torch

            x = torch.from_numpy(x)
        print(path, network(x)[0].tolist())


if __name__ == "__main__":
    print_features(sys.argv[1:])
