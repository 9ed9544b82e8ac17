"""Files that were edited or spoilt: one clear error or none, no code run, nothing changed."""

import re
import shutil
from dataclasses import asdict

import pytest
import torch
from helpers import ROOT, contents, fingerprints, refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment import Run
from hparams import from_dict
from infra import files
from infra.errors import UsageError

# -------------------------------------------------------------------------------------------
# hparams.yaml


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("bs: 4", "bs: 4\n  bs: 8"), ("'bs'", "2 times")),
        (lambda text: text + text, ("'params'", "2 times")),
        (lambda text: "[" * 5000, ("not YAML",)),
        (
            lambda text: text.replace("bs: 4", "bs: !!python/object/new:os.system ['touch owned']"),
            ("not YAML",),
        ),
        (lambda text: text.replace("bs: 4", "bs: !!int many"), ("not YAML",)),
        (lambda text: text.replace("bs: 4", "bs: 2024-99-99"), ("not YAML",)),
        (
            lambda text: text.replace("bs: 4", "bs: !!binary aGk="),
            ("bs must be a whole number", "b'hi'"),
        ),
        (lambda text: text.replace("bs: 4", "bs: true"), ("bs must be a whole number", "True")),
        (
            lambda text: text.replace("bs: 4", f"bs: {'9' * 4000}"),
            ("bs must be a whole number", "..."),
        ),
        (lambda text: text.replace("lr: 0.3", "lr: 1e999"), ("lr must be a number", "inf")),
        (lambda text: text.replace("lr: 0.3", "lr: -.inf"), ("lr must be a number", "-inf")),
        (
            lambda text: re.sub("data_dir: .*", r'data_dir: "a\\0b"', text),
            ("data_dir must be text",),
        ),
        (lambda text: re.sub("data_dir: .*", r'data_dir: "\\uD800"', text), ("hparams.yaml",)),
        (lambda text: text + "  ? [1]\n  : 2\n", ("not YAML",)),
        (lambda text: text + "  null: 2\n", ("unknown", "None")),
        (lambda text: text + f"  {'x' * 900}: 2\n", ("unknown", "...")),
        (lambda text: text + "---\n" + text, ("not YAML",)),
        (lambda text: "\0", ("not YAML",)),
    ],
)
def test_a_hostile_hparams_yaml(copy, monkeypatch, change, words):
    monkeypatch.chdir(copy)
    path = copy / "hparams.yaml"
    path.write_text(change(path.read_text()))
    before = fingerprints(copy)
    result = run("resume", "--exp_dir", copy)
    assert refused(result, 2, "hparams.yaml", *words)
    assert len(result.err) < 600
    assert fingerprints(copy) == before


pieces = st.sampled_from(
    [
        "params:",
        "null",
        "[",
        "]",
        "{",
        "}",
        "&a",
        "*a",
        "!!",
        "!!python/object:os.system",
        "<<",
        "-",
        "1e999",
        ".nan",
        "'",
        '"',
        "\n",
        "\n  ",
        ": ",
        "#",
        "%",
        "|",
        ">",
        "?",
        "@",
        "\t",
        "\0",
        "é",
        "2024-01-01",
        "0x",
        "0b",
        "1:1",
        "~",
        "!!set",
        "!!omap",
    ]
)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    spoilt=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 40), st.one_of(pieces, st.text(max_size=8))),
        max_size=4,
    )
)
def test_any_hparams_yaml_is_read_or_refused(finished, tmp_path, spoilt):
    """Pieces of the file cut out and others put in at any places."""
    text = (finished / "hparams.yaml").read_text()
    for place, length, piece in spoilt:
        start = int(place * len(text))
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


# --------------------------------------------------------------------------------------------
# checkpoints


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


def with_weight(content, change):
    weights = dict(content["encoder"])
    weights["features.0.weight"] = change(weights["features.0.weight"].clone())
    return {**content, "encoder": weights}


def with_buffer(content, change):
    entry = content["optimizer"][0]
    return {
        **content,
        "optimizer": {
            **content["optimizer"],
            0: {"momentum_buffer": change(entry["momentum_buffer"].clone())},
        },
    }


def with_state(content, **values):
    return {**content, "state": {**content["state"], **values}}


def test_another_file_of_the_program_in_the_place_of_a_checkpoint_is_passed_over(copy, finished):
    last = copy / "checkpoints" / "last.pt"
    for path in (copy / "artifacts" / "train.pt", copy / "probe.pt"):
        shutil.copy(path, last)
        result = run("resume", "--exp_dir", copy)
        assert result.code == 0, result.err
        assert f"warning: {last} can't be used (it is not a checkpoint)" in result.err
        assert contents(copy) == contents(finished)


def test_a_file_of_another_program_in_the_place_of_a_checkpoint_is_passed_over(copy, finished):
    last = copy / "checkpoints" / "last.pt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, last)
    result = run("resume", "--exp_dir", copy)
    assert result.code == 0, result.err
    assert f"warning: {last} can't be read (ValueError: not a file of this program)" in result.err
    assert contents(copy) == contents(finished)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda content: with_weight(content, lambda w: w[:4]),
            ("features.0.weight", "size mismatch"),
        ),
        (
            lambda content: {
                **content,
                "encoder": without(content["encoder"], "features.0.weight"),
            },
            ("Missing key",),
        ),
        (
            lambda content: {**content, "encoder": {**content["encoder"], "more": torch.zeros(1)}},
            ("Unexpected key",),
        ),
        (lambda content: with_state(with_buffer(content, lambda b: b[:1]), step=6), ("momenta",)),
    ],
)
def test_weights_of_another_shape_are_refused(copy, change, words):
    last = copy / "checkpoints" / "last.pt"
    torch.save(change(torch.load(last, weights_only=True)), last)
    before = fingerprints(copy)
    assert refused(run("resume", "--exp_dir", copy), 2, *words)
    assert fingerprints(copy) == before


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    flips=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3
    ),
    length=st.floats(0.5, 1),
)
def test_any_damage_of_a_checkpoint_is_found_or_harmless(
    small_checkpoints, tmp_path, flips, length
):
    """Bytes anywhere in last.pt replaced, most of the times its end cut off too: last.pt as it was,
    or the one before.
    """
    folder = shutil.copytree(small_checkpoints, tmp_path / "run", dirs_exist_ok=True)
    last = folder / "checkpoints" / "last.pt"
    damaged = bytearray(last.read_bytes())
    for place, value in flips:
        damaged[int(place * len(damaged))] = value
    last.write_bytes(damaged[: round(length * len(damaged))])
    found = Run(folder).newest_checkpoint()
    assert found["state"]["step"] in (8, 9)
    good = files.read_pt(
        small_checkpoints
        / "checkpoints"
        / ("last.pt" if found["state"]["step"] == 9 else "previous.pt")
    )
    for part in ("encoder", "optimizer"):
        assert str(found[part]) == str(good[part])
    assert found["hparams"] == good["hparams"]


def test_nothing_is_read_that_could_run_code():
    sources = [
        path
        for folder in (".", "images", "infra", "tools", "tools/report", "benchmarks")
        for path in ROOT.glob(f"{folder}/*.py")
    ]
    assert len(sources) > 20
    for source in sources:
        text = source.read_text()
        for bad in (
            r"weights_only\s*=\s*False",
            r"import pickle",
            r"yaml\.\w*load\((?!.*_Loader)",
            r"(?<![.\w])(eval|exec)\(",
        ):
            assert not re.search(bad, text), (source, bad)
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, source
