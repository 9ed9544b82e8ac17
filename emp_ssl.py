"""The encoder of a run in Python: `embeddings, paths = emp_ssl.load(exp_dir).embed(paths)`, as the command embed."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from data import read_images
from encode import encode_images
from experiment import Run, check_changes, is_trained, position
from hparams import Hparams
from infra.console import log
from infra.device import configure, pick_device, pick_precision
from infra.errors import RunError, UsageError
from model import Encoder
from weights import build_encoder


class Embedder(NamedTuple):
    """The encoder of a run on its device, and the settings by which it encodes."""

    hp: Hparams
    encoder: Encoder

    def embed(self, paths):
        """Return (embeddings float32 (N, d) on the CPU, paths): the embeddings of image files by the views of the run, and the
        paths of the files. Files that can't be read are left out of both, with a warning.

        Raises RunError if more than one, and more than 1 in 100, can't be read, or an embedding is not finite.
        """
        paths = [Path(path) for path in paths]
        if not paths:
            raise UsageError("there are no images to embed")
        folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        images, readable = read_images(paths, folder, self.hp.image_size)
        return self.embed_images(images), [paths[i] for i in readable]

    def embed_images(self, images):
        """Return the embeddings float32 (N, d), on the CPU, of images uint8 (N, 3, H, W): a tensor or an ImageFile."""
        device = next(self.encoder.parameters()).device
        bf16 = pick_precision(self.hp.precision, device) == "bf16"
        embeddings = encode_images(self.hp, self.encoder, images, "embed", bf16)["embeddings"]
        if not embeddings.isfinite().all():
            raise RunError("embeddings are not finite: set precision: fp32 in hparams.yaml of a new run")
        return embeddings


def load(exp_dir, device="auto"):
    """Return the Embedder of a run folder. device: auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N. Raises UsageError."""
    device = pick_device(device)
    configure(device)
    hp, _, encoder = load_encoder(exp_dir)
    return Embedder(hp, encoder.to(device, memory_format=torch.channels_last))


def load_encoder(exp_dir):
    """Return (Hparams, checkpoint, encoder) of a run folder. Raises UsageError if it has no checkpoint."""
    run = Run(exp_dir)
    hp, checkpoint = run.read_hparams(), run.newest_checkpoint()
    if not checkpoint:
        raise UsageError(f"{exp_dir} has no checkpoint: there is no encoder yet")
    check_changes(hp, checkpoint)
    if not is_trained(hp, checkpoint):
        epoch, step = position(checkpoint)
        log.info(f"* Training is at epoch {epoch} step {step}, not at its end")
    return hp, checkpoint, build_encoder(hp, checkpoint)
