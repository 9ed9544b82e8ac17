"""Bad input: one clear line, the right exit code, nothing lost."""

import errno
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import RUN, contents, edit, fingerprints, os_error, refused, resume, run

import encode
import evaluate
import loss
import train
from experiment import Run
from infra import distributed, files, lock
from infra.errors import UsageError, explain
from tools.report import page


@pytest.mark.parametrize("argv", ["fly", "train --patches 3", "train --lr", "resume", "report"])
def test_wrong_usage(argv):
    assert refused(run(*argv.split()), 2, "--help")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--n_patches 1.5", ["n_patches: must be a whole number", "1.5"]),
        ("--lr nan", ["lr: must be a number above 0", "nan"]),
        ("--n_epochs=-1", ["n_epochs", "-1"]),
        ("--arch nonsense", ["arch: must be one of", "resnet18-tiny", "nonsense"]),
        ("--uniformity_loss vonmises --bs 1", ["bs", "at least 2"]),
        ("--n_patches 1 --bs 1", ["bs 1", "n_patches 1"]),
        ("--dataset folder --image_size 33", ["image_size", "even", "33"]),
        ("--dataset textures --image_size 64", ["image_size 64", "folder"]),
        ("--dataset textures --n_images 5000", ["n_images 5000", "4000"]),
        ("--dataset textures --n_images 50", ["bs 100", "50"]),
    ],
)
def test_wrong_values_of_options(options, words, tmp_path):
    result = run("train", *options.split(), "--log_folder", tmp_path / "logs")
    assert refused(result, 2, *words)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("params:", "params:\n  momentum: 0.9", ["unknown hyperparameter 'momentum'"]),
        ("params:", f"params:\n  {'x' * 900}: 2", ["unknown", "..."]),
        ("params:", "settings:", ["params:"]),
        (".*", "- a\n- list\n", ["params:"]),
        (".*", "", ["params:"]),
        ("  bs: 4\n", "", ["bs is missing", "100"]),
        ("bs: 4", "bs: 4\n  bs: 8", ["'bs'", "2 times"]),
        ("bs: 4", "bs: four", ["bs must be a whole number", "'four'"]),
        ("bs: 4", "bs: 4.0", ["bs", "4.0"]),
        ("bs: 4", "bs: null", ["bs", "None"]),
        ("bs: 4", "bs: true", ["bs must be a whole number", "True"]),
        ("bs: 4", f"bs: {'9' * 4000}", ["bs must be a whole number", "..."]),
        ("lr: 0.3", f"lr: {'9' * 400}", ["lr", "too large"]),
        ("lr: 0.3", "lr: '0.3'", ["lr", "'0.3'"]),
        ("lr: 0.3", "lr: .nan", ["lr", "nan"]),
        ("batch_norm: true", "batch_norm: 1", ["batch_norm must be true or false"]),
        ("arch: resnet10-tiny", "arch: resnet50", ["arch", "resnet18-cifar", "resnet50"]),
        ("data_dir: [^\n]*", r'data_dir: "a\0b"', ["data_dir must be text"]),
        ("data_dir: [^\n]*", r'data_dir: "\uD800"', []),
        ("bs: 4", "bs: [4", ["is not YAML"]),
        ("bs: 4", "bs: 2024-99-99", ["is not YAML"]),
        (".*", "[" * 5000, ["is not YAML"]),
        ("bs: 4", "bs: !!python/object/apply:os.mkdir [owned]", ["is not YAML"]),
    ],
)
def test_a_wrong_hparams_yaml(copy, monkeypatch, old, new, words):
    monkeypatch.chdir(copy)
    path = copy / "hparams.yaml"
    path.write_text(re.sub(old, lambda match: new, path.read_text(), count=1, flags=re.S))
    before = fingerprints(copy)
    result = resume(copy)
    assert refused(result, 2, "hparams.yaml", *words)
    assert len(result.err) < 600
    assert fingerprints(copy) == before


def test_floats_may_be_written_as_1e_3_or_as_whole_numbers(copy):
    edit(copy, eval_lr="1e-3", weight_decay="1e-4", invariance_loss_weight="200")
    hp = Run(copy).read_hparams()
    assert (hp.eval_lr, hp.weight_decay, hp.invariance_loss_weight) == (1e-3, 1e-4, 200.0)
    assert resume(copy).code == 0


def test_missing_folders(tiny, tmp_path):
    none, empty = tmp_path / "none", tmp_path / "empty"
    empty.mkdir()
    command = [*tiny, "--log_folder", tmp_path / "logs"]
    assert refused(resume(none), 2, none, "not a run folder")
    assert refused(run(*command, "--config_from", none), 2, none)
    assert "did you mean" not in resume(none).err
    for name in ("seed2__numpatch8_seed7", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hparams.yaml").touch()
    for wrong in ("seed2_", "seed2__numpatch8_sed7"):
        words = f"did you mean {tmp_path}/seed2__numpatch8_seed7?"
        assert refused(run("report", "--exp_dir", tmp_path / wrong), 2, words)
    assert refused(run(*command, "--data_dir", none), 2, none, "is not a folder")
    assert refused(run(*command, "--data_dir", empty), 2, "no images in", empty)
    assert not (tmp_path / "logs").exists()


def test_a_checkpoint_of_another_arch(copy):
    last = copy / "checkpoints" / "last.pt"
    content = files.read_pt(last)
    files.write_pt(last, {**content, "hparams": {**content["hparams"], "arch": "resnet18-mini"}})
    before = fingerprints(copy)
    assert refused(resume(copy), 2, "arch", "resnet18-mini", "resnet10-tiny", "--exp_name")
    assert fingerprints(copy) == before


def test_a_run_folder_of_an_earlier_version(copy):
    """One line says which version reads it, for each command, and nothing in it changes."""
    for path in [*(copy / "checkpoints").iterdir(), *(copy / "artifacts").iterdir()]:
        torch.save({**files.read_pt(path), "format": 2}, path)
    before = fingerprints(copy)
    for argv in (["resume"], ["export", "--format", "torchvision"], ["report"]):
        assert refused(run(*argv, "--exp_dir", copy), 2, "earlier version", "git checkout e156b6c")
    assert fingerprints(copy) == before


def test_results_of_an_earlier_version_are_computed_again(tiny, finished, tmp_path):
    """The checkpoints of such a folder were removed, and it is trained again."""
    exp_dir = shutil.copytree(finished, tmp_path / RUN)
    shutil.rmtree(exp_dir / "checkpoints")
    for path in (*(exp_dir / "artifacts").iterdir(), exp_dir / "probe.pt"):
        torch.save({**files.read_pt(path), "format": 2}, path)
    result = run(*tiny, "--log_folder", tmp_path)
    assert result.code == 0, result.err
    assert result.err.count("earlier version") == 3
    assert contents(exp_dir) == contents(finished)


def test_a_folder_that_was_made_for_nothing_is_removed(tiny, tmp_path, monkeypatch):
    """The disk is full when the pid is written into the lock."""
    full = {**vars(os), "getpid": os_error(errno.ENOSPC)}
    monkeypatch.setattr(lock, "os", SimpleNamespace(**full))
    assert refused(run(*tiny, "--log_folder", tmp_path / "logs"), 1, "no space left on the disk")
    assert not (tmp_path / "logs").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_that_would_run_code(copy, monkeypatch):
    monkeypatch.chdir(copy)
    for path in (copy / "checkpoints").iterdir():
        torch.save({"format": files.FORMAT, "encoder": Evil()}, path)
    assert resume(copy).code == 1
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(pickle.dumps(Evil()))
    assert resume(copy).code == 1
    assert not (copy / "owned").exists()


def root_at_zero(value, z):
    """Return the value, with a gradient that is NaN: the slope of the root at 0 is infinite."""
    return value + (z * 0).sum().sqrt()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("invariance_loss", lambda value, z: value * torch.nan, "invariance loss is nan"),
        ("tcr_loss", lambda value, z: value * torch.inf, "uniformity loss is -inf"),
        ("vonmises_loss", root_at_zero, "gradient norm is nan"),
    ],
)
def test_a_number_that_is_not_finite_names_its_step_and_keeps_the_last_checkpoint(
    tiny, tmp_path, monkeypatch, name, change, words
):
    function, calls = getattr(loss, name), []

    def broken(z, **options):
        calls.append(z)
        value = function(z, **options)
        return change(value, z) if len(calls) == 9 else value  # step 2 of epoch 1

    monkeypatch.setattr(loss, name, broken)
    if name != "invariance_loss":
        monkeypatch.setitem(loss.UNIFORMITY, name.removesuffix("_loss"), broken)
    options = ["--uniformity_loss", "vonmises"] if name == "vonmises_loss" else []
    result = run(*tiny, *options, "--checkpoint_every", "1000", "--log_folder", tmp_path)
    assert refused(result, 1, "epoch 1 step 2", words)
    kept = files.read_pt(tmp_path / RUN / "checkpoints" / "last.pt")
    assert kept["state"]["step"] == 6  # the start of epoch 1
    assert all(value.isfinite().all() for value in kept["encoder"].values())
    monkeypatch.undo()
    assert resume(tmp_path / RUN).code == 0


def encode_with(monkeypatch, change):
    """Replace encode.encode by one whose results are changed."""
    original = encode.encode
    monkeypatch.setattr(encode, "encode", lambda *args, **kwargs: change(original(*args, **kwargs)))


def test_embeddings_that_are_not_finite_are_not_written(tiny, tmp_path, monkeypatch):
    def change(encoded):
        embeddings = encoded["embeddings"].clone()
        embeddings[:, 2] = torch.nan
        return encoded | {"embeddings": embeddings}

    encode_with(monkeypatch, change)
    result = run(*tiny, "--log_folder", tmp_path)
    assert refused(result, 1, "embeddings of the train images are not finite")
    assert not list((tmp_path / RUN / "artifacts").iterdir())


def test_features_beyond_float16_are_not_saved(tiny, tmp_path, monkeypatch):
    encode_with(
        monkeypatch, lambda encoded: encoded | {"features": 10 * 65504 * encoded["features"]}
    )
    result = run(*tiny, "--log_folder", tmp_path, "--save_proj")
    assert refused(result, 1, "save_proj: features of the train images")
    assert not list(tmp_path.rglob("train.pt"))


def test_a_probe_that_diverges_is_an_error_and_not_a_result(tiny, tmp_path, monkeypatch):
    linear = evaluate.linear
    monkeypatch.setattr(evaluate, "linear", lambda weight, bias: linear(weight * torch.inf, bias))
    result = run(*tiny, "--log_folder", tmp_path, "--eval_lr", "1e9")
    assert refused(result, 1, "weights of the linear probe are not finite with eval_lr 1e+09")
    assert not (tmp_path / RUN / "probe.pt").exists()


def test_processes_with_a_single_patch_each_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert distributed.shard_size(2, 2) == 1
    with pytest.raises(UsageError, match="single patch in each of 2 processes"):
        distributed.shard_size(2, 1)


def test_out_of_memory_in_each_of_its_spellings():
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 5.00 GB)",
        "DefaultCPUAllocator: can't allocate memory: 9 bytes",
    ):
        assert explain(RuntimeError(text)).startswith("out of memory"), text
    other = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert "--debug" in explain(other)


@pytest.mark.parametrize("error", ["CUDA", "CPU"])
def test_too_little_memory_says_what_to_lower_and_the_run_goes_on(
    tiny, finished, tmp_path, monkeypatch, error
):
    step, calls = train.train_step, []

    def hungry(*args, **settings):
        calls.append(args)
        if len(calls) == 9 and error == "CUDA":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if len(calls) == 9:
            torch.empty(2**50)
        return step(*args, **settings)

    monkeypatch.setattr(train, "train_step", hungry)
    result = run(*tiny, "--log_folder", tmp_path)
    assert refused(result, 1, "out of memory", "bs", "n_patches", "precision: bf16")
    monkeypatch.undo()
    assert resume(tmp_path / RUN).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_a_folder_that_cannot_be_written_stops_before_training(tiny, copy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    result = run(*tiny, "--log_folder", tmp_path / "file")
    assert refused(result, 1, tmp_path / "file")
    assert "epoch 0" not in result.out
    edit(copy, n_epochs=3)
    before = fingerprints(copy)
    monkeypatch.setattr(lock, "open", os_error(errno.EROFS), raising=False)
    assert refused(resume(copy), 1, copy, "Read-only file system")
    assert fingerprints(copy) == before


def test_a_finished_run_in_a_folder_that_can_not_be_written(copy, tmp_path, monkeypatch):
    """What is done in it is shown. What would be written goes to another place, or is refused."""
    before = fingerprints(copy)
    writable, mkdir = os.access, Path.mkdir

    def mkdir_elsewhere(path, *args, **options):
        if path == copy / "export":
            os_error(errno.EROFS)(path)
        mkdir(path, *args, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: path != copy and writable(path, mode))
    monkeypatch.setattr(lock, "open", os_error(errno.EROFS), raising=False)
    monkeypatch.setattr(Path, "mkdir", mkdir_elsewhere)
    monkeypatch.setattr(page, "images_context", lambda *args: {"missing": ""})  # it takes seconds
    result = resume(copy)
    assert (result.code, result.err) == (0, "")
    assert "linear probe" in result.out
    assert refused(run("report", "--exp_dir", copy), 2, "--out", "can be written")
    export = ["export", "--exp_dir", copy, "--format", "torchvision"]
    assert refused(run(*export), 1, "Read-only file system", "--out")
    assert run("report", "--exp_dir", copy, "--out", tmp_path / "x.html").code == 0
    assert copy.name in (tmp_path / "x.html").read_text()
    assert run(*export, "--out", tmp_path / "new" / "folder").code == 0
    assert (tmp_path / "new" / "folder" / "backbone.pt").exists()
    assert refused(resume(copy, "--n_epochs 3"), 1, copy, "can't be written", "copy it")
    assert fingerprints(copy) == before


def test_debug_shows_the_traceback(tiny, tmp_path):
    result = run(*tiny, "--data_dir", tmp_path / "none", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
