"""Damaged hparams.yaml and checkpoints: one clear error or none, no code run, nothing changed."""

import re
import shutil
from dataclasses import asdict

import pytest
import torch
from helpers import ROOT, contents, fingerprints, refused, resume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment import Run
from hparams import from_dict
from infra import files
from infra.errors import UsageError

REPEATED = dict(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
YAML_PIECES = (
    "params: null [ ] { } &a *a !! !!python/object:os.system << - 1e999 .nan ' \" : # % | > ? @ "
    "é 2024-01-01 0x 0b 1:1 ~ !!set !!omap"
).split() + ["\n", "\n  ", ": ", "\t", "\0"]


@settings(max_examples=400, **REPEATED)
@given(
    edits=st.lists(
        st.tuples(
            st.floats(0, 1),
            st.integers(0, 40),
            st.one_of(st.sampled_from(YAML_PIECES), st.text(max_size=8)),
        ),
        max_size=4,
    )
)
def test_any_hparams_yaml_is_read_or_refused(finished, tmp_path, edits):
    """Pieces of the file cut out anywhere, and others put in."""
    text = (finished / "hparams.yaml").read_text()
    for position, length, piece in edits:
        start = int(position * len(text))
        text = text[:start] + piece + text[start + length :]
    path = tmp_path / "hparams.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    before = path.read_bytes()
    try:
        hp = Run(tmp_path).read_hparams()
        assert from_dict(asdict(hp), "again") == hp
    except UsageError as error:
        assert "hparams.yaml" in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 600
    assert path.read_bytes() == before


@settings(max_examples=150, **REPEATED)
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3
    ),
    length=st.floats(0.5, 1),
)
def test_any_damage_of_a_checkpoint_is_detected_or_harmless(
    small_checkpoints, tmp_path, changes, length
):
    """Bytes of last.pt changed anywhere, and its end cut off: last.pt as it was, or previous.pt."""
    folder = shutil.copytree(small_checkpoints, tmp_path / "run", dirs_exist_ok=True)
    last = folder / "checkpoints" / "last.pt"
    damaged = bytearray(last.read_bytes())
    for position, value in changes:
        damaged[int(position * len(damaged))] = value
    last.write_bytes(damaged[: round(length * len(damaged))])
    checkpoint = Run(folder).newest_checkpoint()
    name = {8: "previous.pt", 9: "last.pt"}[checkpoint["state"]["step"]]
    good = files.read_pt(small_checkpoints / "checkpoints" / name)
    assert checkpoint["hparams"] == good["hparams"]
    for part in ("encoder", "optimizer"):
        assert str(checkpoint[part]) == str(good[part])


def test_other_files_instead_of_a_checkpoint_are_passed_over(copy, finished):
    last = copy / "checkpoints" / "last.pt"

    def assert_passed_over(reason):
        result = resume(copy)
        assert result.code == 0, result.err
        assert f"warning: {last} {reason}" in result.err
        assert contents(copy) == contents(finished)

    for path in (copy / "artifacts" / "train.pt", copy / "probe.pt"):
        shutil.copy(path, last)
        assert_passed_over("can't be used (it is not a checkpoint)")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, last)
    assert_passed_over("can't be read (ValueError: not a file of this program)")


def cut_weight(content):
    content["encoder"]["features.0.weight"] = content["encoder"]["features.0.weight"][:4].clone()


def remove_weight(content):
    del content["encoder"]["features.0.weight"]


def add_weight(content):
    content["encoder"]["more"] = torch.zeros(1)


def cut_momentum(content):
    momentum = content["optimizer"][0]
    momentum["momentum_buffer"] = momentum["momentum_buffer"][:1].clone()
    content["state"]["step"] = 6  # training goes on, which needs the momenta


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_weight, ["features.0.weight", "size mismatch"]),
        (remove_weight, ["Missing key"]),
        (add_weight, ["Unexpected key"]),
        (cut_momentum, ["momenta"]),
    ],
)
def test_weights_of_another_shape_are_refused(copy, change, words):
    last = copy / "checkpoints" / "last.pt"
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, last)
    before = fingerprints(copy)
    assert refused(resume(copy), 2, *words)
    assert fingerprints(copy) == before


def test_nothing_is_read_that_could_run_code():
    folders = (".", "images", "infra", "tools", "tools/report", "benchmarks")
    sources = [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    assert len(sources) > 20
    forbidden = (
        r"weights_only\s*=\s*False",
        r"import pickle",
        r"yaml\.\w*load\((?!.*_Loader)",
        r"(?<![.\w])(eval|exec)\(",
    )
    for source in sources:
        text = source.read_text()
        for pattern in forbidden:
            assert not re.search(pattern, text), (source, pattern)
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, source
