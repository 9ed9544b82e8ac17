"""Bad input: one clear line, the right exit code, nothing lost."""

import errno
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import RUN, contents, edit, fingerprints, refused, run

import encode
import evaluate
import loss
import train
from experiment import Run
from hparams import SETTINGS
from infra import distributed, files, lock
from infra.errors import UsageError, explain


def wrong_values(param):
    if param.type is bool:
        return []
    wrong = ["nonsense"] if param.choices else []
    if param.type in (int, float):
        wrong += ["many", "nan", "inf", "-1", str(10**30), "1e999", str(param.high + 1)]
        wrong += ["0"] * (param.low == 1 or param.above) + ["1.5"] * (param.type is int)
    return wrong


OPTIONS = [(param.name, value) for param in SETTINGS.values() for value in wrong_values(param)] + [
    ("tcr_eps", "1e-300")
]


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_a_wrong_value_of_an_option(name, value, tmp_path):
    assert refused(
        run("train", f"--{name}={value}", "--log_folder", tmp_path / "logs"), 2, name, value
    )
    assert not (tmp_path / "logs").exists()


def test_each_option_with_a_value_has_a_wrong_one():
    free_text = {
        "pretrained_proj",
        "weights",
        "data_dir",
        "device",
        "labels",
    }  # whose errors are tested by themselves
    assert {name for name, _ in OPTIONS} | free_text == {
        param.name for param in SETTINGS.values() if param.type is not bool
    }


@pytest.mark.parametrize("argv", ["fly", "train --patches 3", "train --lr", "resume", "report"])
def test_wrong_usage(argv):
    assert refused(run(*argv.split()), 2, "--help")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--uniformity_loss", "vonmises", "--bs", "1"], ("bs", "at least 2")),
        (["--n_patches", "1", "--bs", "1"], ("bs 1", "n_patches 1")),
        (["--dataset", "folder", "--image_size", "33"], ("image_size", "even", "33")),
        (["--dataset", "textures", "--image_size", "64"], ("image_size 64", "folder")),
        (["--dataset", "textures", "--n_images", "5000"], ("n_images 5000", "4000")),
        (["--dataset", "textures", "--n_images", "50"], ("bs 100", "50")),
    ],
)
def test_values_that_do_not_go_together(argv, words, tmp_path):
    assert refused(run("train", *argv, "--log_folder", tmp_path / "logs"), 2, *words)
    assert not (tmp_path / "logs").exists()


def rewrite(exp_dir, change):
    path = exp_dir / "hparams.yaml"
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "  momentum: 0.9\n", ("unknown hyperparameter 'momentum'",)),
        (lambda text: re.sub("  bs: 4\n", "", text), ("bs is missing", "100")),
        (lambda text: text.replace("bs: 4", "bs: four"), ("bs must be a whole number", "'four'")),
        (lambda text: text.replace("bs: 4", "bs: 4.0"), ("bs", "4.0")),
        (lambda text: text.replace("bs: 4", "bs: null"), ("bs", "None")),
        (lambda text: text.replace("lr: 0.3", f"lr: {'9' * 400}"), ("lr", "too large")),
        (lambda text: text.replace("lr: 0.3", "lr: '0.3'"), ("lr", "'0.3'")),
        (lambda text: text.replace("lr: 0.3", "lr: .nan"), ("lr", "nan")),
        (
            lambda text: text.replace("batch_norm: true", "batch_norm: 1"),
            ("batch_norm must be true or false",),
        ),
        (
            lambda text: text.replace("arch: resnet18-tiny", "arch: resnet50"),
            ("arch", "resnet18-cifar", "resnet50"),
        ),
        (lambda text: text.replace("params:", "settings:"), ("params:",)),
        (lambda text: "- a\n- list\n", ("params:",)),
        (lambda text: "", ("params:",)),
        (lambda text: text.replace("bs: 4", "bs: [4"), ("is not YAML",)),
        (
            lambda text: text.replace("bs: 4", "bs: !!python/object/apply:os.mkdir [owned]"),
            ("is not YAML",),
        ),
    ],
)
def test_a_wrong_hparams_yaml(copy, monkeypatch, change, words):
    monkeypatch.chdir(copy)
    rewrite(copy, change)
    before = fingerprints(copy)
    assert refused(run("resume", "--exp_dir", copy), 2, "hparams.yaml", *words)
    assert fingerprints(copy) == before


def test_floats_may_be_written_as_1e_3_or_as_whole_numbers(copy):
    edit(copy, eval_lr="1e-3", weight_decay="1e-4", invariance_loss_weight="200")
    hp = Run(copy).read_hparams()
    assert (hp.eval_lr, hp.weight_decay, hp.invariance_loss_weight) == (1e-3, 1e-4, 200.0)
    assert run("resume", "--exp_dir", copy).code == 0


def test_missing_folders(tiny, tmp_path):
    logs = tmp_path / "logs"
    assert refused(
        run("resume", "--exp_dir", tmp_path / "none"), 2, tmp_path / "none", "not a run folder"
    )
    assert refused(
        run(*tiny, "--config_from", tmp_path / "none", "--log_folder", logs), 2, tmp_path / "none"
    )
    assert refused(
        run(*tiny, "--data_dir", tmp_path / "none", "--log_folder", logs),
        2,
        tmp_path / "none",
        "is not a folder",
    )
    (tmp_path / "empty").mkdir()
    assert refused(
        run(*tiny, "--data_dir", tmp_path / "empty", "--log_folder", logs),
        2,
        "no images in",
        tmp_path / "empty",
    )
    assert not logs.exists()


def test_a_checkpoint_of_another_arch(copy, finished):
    """Swapped in whole, it is told by its settings; with settings that lie, by its weights."""
    last = copy / "checkpoints" / "last.pt"
    content = files.read_pt(last)
    files.write_pt(last, {**content, "hparams": {**content["hparams"], "arch": "resnet18-mini"}})
    before = fingerprints(copy)
    assert refused(
        run("resume", "--exp_dir", copy), 2, "arch", "resnet18-mini", "resnet18-tiny", "--exp_name"
    )
    assert fingerprints(copy) == before
    files.write_pt(
        last,
        {**content, "encoder": {**content["encoder"], "features.0.weight": torch.zeros(8, 64)}},
    )
    assert refused(run("resume", "--exp_dir", copy), 2, "features.0.weight")


def test_a_run_folder_of_an_earlier_version(copy):
    """One line says which version reads it, whatever is asked of the folder, and nothing in it
    changes.
    """
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
    monkeypatch.setattr(lock, "os", SimpleNamespace(**{**vars(os), "getpid": full_disk}))
    assert refused(run(*tiny, "--log_folder", tmp_path / "logs"), 1, "no space left on the disk")
    assert not (tmp_path / "logs").exists()


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_that_would_run_code(copy, monkeypatch):
    monkeypatch.chdir(copy)
    for path in (copy / "checkpoints").iterdir():
        torch.save({"format": files.FORMAT, "encoder": Evil()}, path)
    assert run("resume", "--exp_dir", copy).code == 1
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(pickle.dumps(Evil()))
    assert run("resume", "--exp_dir", copy).code == 1
    assert not (copy / "owned").exists()


BREAKS = {  # what becomes of a loss, and what is named
    "invariance_loss": (lambda value, z: value * torch.nan, "invariance loss is nan"),
    "tcr_loss": (lambda value, z: value * torch.inf, "uniformity loss is -inf"),
    "vonmises_loss": (
        lambda value, z: value + (z * 0).sum().sqrt(),
        "gradient norm is nan",
    ),  # the root's slope at 0 is inf
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_number_that_is_not_finite_names_its_step_and_keeps_the_last_checkpoint(
    tiny, tmp_path, monkeypatch, name
):
    function, calls, (change, words) = getattr(loss, name), [], BREAKS[name]
    uniformity = name.removesuffix("_loss")

    def broken(z, **options):
        calls.append(z)
        value = function(z, **options)
        return change(value, z) if len(calls) == 9 else value  # step 2 of epoch 1

    monkeypatch.setattr(loss, name, broken)
    monkeypatch.setattr(
        loss,
        "UNIFORMITY",
        {key: broken if key == uniformity else of for key, of in loss.UNIFORMITY.items()},
    )
    options = ("--uniformity_loss", "vonmises") if name == "vonmises_loss" else ()
    result = run(*tiny, *options, "--checkpoint_every", "1000", "--log_folder", tmp_path)
    assert refused(result, 1, "epoch 1 step 2", words)
    kept = files.read_pt(tmp_path / RUN / "checkpoints" / "last.pt")
    assert kept["state"]["step"] == 6  # the start of epoch 1
    assert all(value.isfinite().all() for value in kept["encoder"].values())
    monkeypatch.undo()
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", [loss.invariance_loss, loss.tcr_loss, loss.vonmises_loss])
def test_one_number_that_is_not_finite_shows_in_the_loss(of, value):
    z = torch.nn.functional.normalize(torch.randn(3, 8, 4, generator=torch.manual_seed(0)), dim=-1)
    assert of(z).isfinite()
    z[1, 5, 2] = value
    assert not of(z).isfinite()


def test_embeddings_that_are_not_finite_are_not_written(tiny, tmp_path, monkeypatch):
    original = encode.encode

    def broken(*args, **kwargs):
        encoded = original(*args, **kwargs)
        return {
            **encoded,
            "embeddings": encoded["embeddings"]
            .clone()
            .index_fill_(1, torch.tensor([2]), torch.nan),
        }

    monkeypatch.setattr(encode, "encode", broken)
    assert refused(
        run(*tiny, "--log_folder", tmp_path), 1, "embeddings of the train images are not finite"
    )
    assert not list((tmp_path / RUN / "artifacts").iterdir())


def test_a_probe_that_diverges_is_an_error_and_not_a_result(tiny, tmp_path, monkeypatch):
    linear = evaluate.linear
    monkeypatch.setattr(evaluate, "linear", lambda weight, bias: linear(weight * torch.inf, bias))
    result = run(*tiny, "--log_folder", tmp_path, "--eval_lr", "1e9")
    assert refused(result, 1, "weights of the linear probe are not finite with eval_lr 1e+09")
    assert not (tmp_path / RUN / "probe.pt").exists()


def test_features_beyond_float16_are_not_saved(tiny, tmp_path, monkeypatch):
    original = encode.encode

    def encode_large(*args, **kwargs):
        encoded = original(*args, **kwargs)
        return encoded | {"features": 10 * 65504 * encoded["features"]}

    monkeypatch.setattr(encode, "encode", encode_large)
    assert refused(
        run(*tiny, "--log_folder", tmp_path, "--save_proj"),
        1,
        "save_proj: features of the train images",
    )
    assert not list(tmp_path.rglob("train.pt"))


def test_processes_with_a_single_patch_each_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert distributed.shard_size(2, 2) == 1
    with pytest.raises(UsageError, match="single patch in each of 2 processes"):
        distributed.shard_size(2, 1)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 5.00 GB)",
        "DefaultCPUAllocator: can't allocate memory: 9 bytes",
    ],
)
def test_out_of_memory_in_each_of_its_spellings(text):
    assert explain(RuntimeError(text)).startswith("out of memory")
    assert "--debug" in explain(
        RuntimeError("CUDA error: an illegal memory access was encountered")
    )


@pytest.mark.parametrize("error", ["CUDA", "CPU"])
def test_too_little_memory_says_what_to_lower_and_the_run_goes_on(
    tiny, finished, tmp_path, monkeypatch, error
):
    step, calls = train.train_step, []

    def hungry(*args, **settings):
        calls.append(args)
        if len(calls) == 9 and error == "CUDA":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"
            )
        if len(calls) == 9:
            torch.empty(2**50)
        return step(*args, **settings)

    monkeypatch.setattr(train, "train_step", hungry)
    assert refused(
        run(*tiny, "--log_folder", tmp_path),
        1,
        "out of memory",
        "bs",
        "n_patches",
        "precision: bf16",
    )
    monkeypatch.undo()
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_a_folder_that_cannot_be_written_is_found_before_training(
    tiny, copy, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    result = run(*tiny, "--log_folder", tmp_path / "file")
    assert refused(result, 1, tmp_path / "file")
    assert "epoch 0" not in result.out
    edit(copy, n_epochs=3)
    before = fingerprints(copy)
    monkeypatch.setattr(lock, "opened", read_only)
    assert refused(run("resume", "--exp_dir", copy), 1, copy, "Read-only file system")
    assert fingerprints(copy) == before


def read_only(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_debug_shows_the_traceback(tiny, tmp_path):
    result = run(*tiny, "--data_dir", tmp_path / "none", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
