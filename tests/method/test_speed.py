"""The benchmark of speed: what a choice changes of the program."""

from functools import partial

import pytest
import torch

import encode
from benchmarks import speed
from model import Conv3x3


@pytest.mark.parametrize(
    "name", ["torch's convolutions on 2x2 pixels too", "batch norm not folded in encoding"]
)
def test_a_choice_replaces_its_part_of_the_program(name, monkeypatch):
    monkeypatch.setattr(speed, "Side", partial(speed.Side, B=4))
    convolution, fold = Conv3x3.forward, encode.fold_batch_norm
    monkeypatch.setattr(Conv3x3, "forward", convolution)  # to be restored
    monkeypatch.setattr(encode, "fold_batch_norm", fold)
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "")

    seconds = speed.time_choice("cpu", name)
    assert seconds.keys() == {"first", "seconds", "encoding"}
    assert min(seconds.values()) > 0
    is_convolution = name.startswith("torch's")
    assert (Conv3x3.forward is torch.nn.Conv2d.forward) == is_convolution
    assert (encode.fold_batch_norm is fold) == is_convolution
