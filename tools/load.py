"""Load the exported network that the JSON file of the same name describes.

`python FILE.py IMAGE ...` prints what the network makes of images. It needs NumPy and Pillow; for
an ONNX file onnxruntime, else torch with torchvision or timm.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from images.pixels import read_image


def load():
    """Return the network: float32 (N, 3, S, S) in [-1, 1] -> float32 (N, dim).

    It returns features, representations or logits: the JSON file says which, in output, and has S,
    input_size, and dim. A network in an ONNX file takes and returns NumPy arrays, others are a
    torch.nn.Module.
    """
    description = read_description()
    path = Path(__file__).with_name(description["file"])
    if description["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return lambda x: session.run(None, {"images": x})[0]
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

    backbone = build_backbone(description["network"])
    head = build_head(description["features"], description["head"])
    if description["representation"]:
        return build_representation(backbone, head, description["representation"])
    if description["network"]["library"] == "timm":
        return nn.Sequential(backbone, head) if description["head"] else backbone
    backbone.fc = head
    return backbone


def build_backbone(network):
    """Return a model of timm or torchvision without its classifier: (N, 3, H, W) -> (N, features).

    network: its description.
    """
    from torch import nn

    if network["library"] == "timm":
        import timm

        return timm.create_model(network["name"], num_classes=0, **network["options"])
    import torchvision

    if network["name"] == "resnet10":  # which torchvision has no name for
        block = torchvision.models.resnet.BasicBlock
        model = torchvision.models.ResNet(block, [1, 1, 1, 1])
    else:
        model = torchvision.models.get_model(network["name"])
    if network["small_stem"]:
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    for name in ("fc", *network["removed"]):
        setattr(model, name, nn.Identity())
    return model


def build_head(n_features, layer):
    """Return the feature layer, (N, n_features) -> (N, h_dim), or the identity if layer is None."""
    from torch import nn

    if layer is None:
        return nn.Identity()
    norm = [nn.BatchNorm1d(layer["h_dim"])] if layer["batch_norm"] else []
    activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[layer["activation"]]
    return nn.Sequential(nn.Linear(n_features, layer["h_dim"]), *norm, activation())


def build_representation(backbone, head, how):
    """Return the network from whole images, (N, 3, H, H), to their representation or class logits.

    how: a dict. emb_pool: "stages", "blocks", or another name for the output of the head.
    pool_grid: the stages or blocks are averaged in pool_grid x pool_grid parts. mirror: the mean
    with the mirror image. side: pixels to which images of image_size are resized first. dim:
    dimensions of the representation. n_classes: of the linear probe, None for no probe.
    """
    import torch
    from torch import nn

    class Representation(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.head = head
            C = how["n_classes"]
            self.probe = nn.Linear(how["dim"], C) if C else nn.Identity()
            # Resizing is a product with a matrix along each axis.
            self.register_buffer("resize", torch.zeros(how["side"], how["image_size"]))

        def forward(self, x):
            if how["side"] != how["image_size"]:
                x = (self.resize @ x @ self.resize.T).clamp(-1, 1)
            y = self.represent(x)
            if how["mirror"]:
                y = (y + self.represent(x.flip(3))) / 2
            return self.probe(y)

        def represent(self, x):
            if how["emb_pool"] not in ("stages", "blocks"):
                return self.head(self.backbone(x))
            net = self.backbone
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            maps = [x] if how["emb_pool"] == "blocks" else []
            for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
                blocks = list(stage.children())  # none where a stage was removed
                for block in blocks:
                    x = block(x)
                    if how["emb_pool"] == "blocks" or block is blocks[-1]:
                        maps.append(x)
            pool = nn.AdaptiveAvgPool2d(how["pool_grid"])
            return torch.cat([pool(x).flatten(1) for x in maps], 1)

    return Representation()


def read(path):
    """Return an image file as input of the network, NumPy float32 (1, 3, S, S).

    The square image that read_image returns, resized to S. Raises UnreadableImage.
    """
    description = read_description()
    S = description["input_size"]
    how = [description[name] for name in ("image_size", "value_range", "max_pixels", "fit")]
    pixels = read_image(path, *how)  # (3, image_size, image_size)
    image = Image.fromarray(pixels.transpose(1, 2, 0)).resize((S, S), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1  # (S, S, 3) -> ...


def read_description():
    """Return the content of the JSON file."""
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def print_outputs(paths):
    """Print a line for each image file: its path and what the network makes of it."""
    network = load()
    for path in paths:
        x = read(path)
        if read_description()["format"] != "onnx":
            import torch

            x = torch.from_numpy(x)
        print(path, network(x)[0].tolist())


if __name__ == "__main__":
    print_outputs(sys.argv[1:])
