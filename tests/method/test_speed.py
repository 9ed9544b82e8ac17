"""The benchmark of speed: what a choice changes of the program."""

from functools import partial

import pytest

import encode
from benchmarks import speed
from model import Conv3x3


@pytest.mark.parametrize(
    ("name", "own_convolution", "folded"),
    [
        ("as it is", True, True),
        ("torch's convolutions on 2x2 pixels too", False, True),
        ("batch norm not folded in encoding", True, False),
    ],
)
def test_a_choice_replaces_its_part_of_the_program(name, own_convolution, folded, monkeypatch):
    monkeypatch.setattr(speed, "Side", partial(speed.Side, B=4))
    convolution, fold = Conv3x3.forward, encode.fold_batch_norm
    monkeypatch.setattr(Conv3x3, "forward", convolution)  # to be restored, as the next two
    monkeypatch.setattr(encode, "fold_batch_norm", fold)
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "")
    speed.time_choice("cpu", name)
    assert (Conv3x3.forward is convolution) == own_convolution
    assert (encode.fold_batch_norm is fold) == folded
