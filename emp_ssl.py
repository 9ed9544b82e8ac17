"""The encoder of a run in Python: `embeddings, paths = emp_ssl.load(exp_dir).embed(paths)`."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from data import read_images
from encode import check_views, encode_images
from experiment import Run
from images.cache import ImageFile
from infra.errors import RunError, UsageError
from model import Encoder
from weights import build_encoder


class Embedder(NamedTuple):
    """The encoder of a run on its device, and the run by whose settings it encodes."""

    run: Run
    encoder: Encoder

    def embed(self, paths):
        """Return (embeddings, paths) of image files, by the views of the run.

        embeddings: float32 (N, d) on the CPU. paths: of the files that could be read, list of str.
        The others are left out of both, with a warning. Raises RunError if more than one, and more
        than 1 in 100, can't be read, or an embedding is not finite.
        """
        paths = [Path(path) for path in paths]
        if not paths:
            raise UsageError("there are no images to embed")
        folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        images, readable = read_images(paths, folder, self.run.hp.decoding)
        return self.embed_images(images), [str(paths[i]) for i in readable]

    def embed_images(self, images):
        """Return the embeddings float32 (N, d), on the CPU, of images uint8 (N, 3, H, W).

        images: a tensor or an ImageFile. Raises TypeError for any other images, such as those in
        [0, 1], and RunError if an embedding is not finite.
        """
        check_images(images)
        embeddings = encode_images(self.run, self.encoder, images, "embed")["embeddings"]
        if not embeddings.isfinite().all():
            raise RunError(
                "embeddings are not finite: set precision: fp32 in hparams.yaml of a new run"
            )
        return embeddings


def check_images(images):
    """Raise TypeError unless the images are uint8 (N, 3, H, W), a tensor or an ImageFile."""
    if isinstance(images, ImageFile):
        return
    is_uint8 = isinstance(images, torch.Tensor) and images.dtype == torch.uint8
    if not is_uint8 or images.ndim != 4 or images.shape[1] != 3:
        dtype = getattr(images, "dtype", type(images).__name__)
        shape = tuple(getattr(images, "shape", ()))
        raise TypeError(
            f"images must be a torch.uint8 tensor (N, 3, H, W) of values from 0 to 255, not "
            f"{dtype} {shape}"
        )


def load(exp_dir, device="auto"):
    """Return the Embedder of a run folder.

    device: auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N. Raises UsageError if the device or
    the encoder is not there.
    """
    run = Run(exp_dir).load(device)
    encoder = build_encoder(run)
    check_views(run.hp, encoder)
    encoder = encoder.to(run.device, memory_format=torch.channels_last)
    return Embedder(run, encoder)
