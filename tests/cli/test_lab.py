"""The jobs of a lab, on a few small images."""

from pathlib import Path

import pytest
import torch
from helpers import run, write_images

from benchmarks import lab
from infra import files

SETTINGS = (
    "--image_size 16 --arch resnet10-tiny --h_dim 8 --z_dim 4 --n_patches 2 --bs 4 --n_epochs 0.5 "
    "--n_eval_epochs 2 --device cpu --precision fp32"
)


def test_all_jobs_run_once_and_keep_their_figures(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    for seed, name in enumerate(("a/across", "a/down", "b/down", "b/down/below")):
        write_images(tmp_path / "images" / name, 10, seed)
    called = []

    def timed(words, folder):
        monkeypatch.chdir(folder)
        called.append(words[0])
        result = run(*words)
        assert result.code == 0, result.err
        return result.out + result.err, 1.0

    monkeypatch.setattr(lab, "timed", timed)
    words = ["--images", tmp_path / "images", "--log_folder", tmp_path / "logs", "--out", tmp_path]
    words += [f"--settings={SETTINGS}", "--disturbed"]
    lab.main(list(map(str, words)))
    results = files.read_json(tmp_path / "lab.json")
    assert results["n"] == {"images": 36, "labelled": 9, "added": 4} and results["disturbed"]
    assert len(list((tmp_path / "logs").rglob("new.npz"))) == 1
    assert (tmp_path / "logs" / "sheet.html").exists()
    assert len(called) == 9 and len(results["jobs"]) == 8
    assert all(job["seconds"] == 1 and job["commit"] for job in results["jobs"].values())
    assert all(
        0 <= share <= 100 for shares in results["leaves"].values() for share in shares.values()
    )
    assert 0 <= results["probe"]["balanced_top1"] <= 100 and results["commit"]

    called.clear()
    lab.main(list(map(str, words)))
    assert called == ["resume"]  # which asks for the commands that are next
    assert files.read_json(tmp_path / "lab.json") == results


def test_a_job_that_fails_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="no_such_command"):
        lab.timed(["no_such_command"], tmp_path)


def test_the_share_of_neighbours_in_the_same_folder_is_that_of_a_loop(monkeypatch):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 5
    folders = [("a", "b", "c", lab.LEFT_OUT)[i % 4] for i in range(40)]
    paths = [Path(name, f"{i}.png") for i, name in enumerate(folders)]
    shares = lab.leaf_shares(x, paths)
    for name, vectors in (("as given", x), ("centred", x - x.mean(0))):
        n_same = 0
        queries = [i for i in range(40) if folders[i] != lab.LEFT_OUT]
        for i in queries:
            cosines = [float(torch.cosine_similarity(vectors[i], row, dim=0)) for row in vectors]
            order = sorted(set(range(40)) - {i}, key=lambda j: -cosines[j])
            n_same += sum(folders[j] == folders[i] for j in order[:5])
        assert abs(shares[name] - 100 * n_same / (5 * len(queries))) < 1e-3
