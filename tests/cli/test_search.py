"""search: against NumPy; the page; what it refuses."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import refused, run, write_images
from PIL import Image

import emp_ssl
from data import Images
from experiment import Run
from infra import files


def hits_of(out):
    """Return [(query, [[cosine, name, class], ...]), ...] of what search prints."""
    found = []
    for line in out.splitlines():
        if re.match(r" *-?\d\.\d\d ", line):
            found[-1][1].append(line.split())
        else:
            found.append((line, []))
    return found


def cosines_of(queries, x):
    """Return the centred cosines (n, N) of queries (n, d) and a collection (N, d), in NumPy."""
    queries, x = (part.astype(np.float64) - x.mean(0, dtype=np.float64) for part in (queries, x))
    norms = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(x, axis=1))
    return queries @ x.T / norms


def assert_nearest(hits, cosines, names):
    """Assert that the hits are the k greatest cosines, in order; ties may stand in any order."""
    shown = [float(cosine) for cosine, *_ in hits]
    np.testing.assert_allclose(shown, np.sort(cosines)[::-1][: len(hits)], atol=0.0051)
    of_names = [cosines[names.index(name)] for _, name, *_ in hits]
    np.testing.assert_allclose(shown, of_names, atol=0.0051)
    assert len({name for _, name, *_ in hits}) == len(hits)


def test_the_images_of_a_run_that_are_nearest(finished, images, tmp_path):
    """A query that is one of them comes first. The page shows each once and links to its file."""
    encoded = [files.read_pt(finished / "artifacts" / f"{split}.pt") for split in ("train", "test")]
    x = np.concatenate([content["embeddings"].numpy() for content in encoded])
    names = [path for content in encoded for path in content["paths"]]
    write_images(tmp_path / "down", 1, 5)
    queries = [images / "train" / "across" / "3.png", tmp_path / "down" / "0.png"]
    out = tmp_path / "sheet.html"
    argv = ["search", "--exp_dir", finished, "--k", 4, "--device", "cpu", "--query", *queries]
    result = run(*argv, "--out", out)
    assert (result.code, result.err) == (0, "")
    *found, (wrote, _) = hits_of(result.out)
    assert wrote == f"* Wrote {out}"
    assert [query for query, _ in found] == [str(path) for path in queries]
    embeddings = emp_ssl.load(finished, "cpu").embed(queries)[0].numpy()
    for (_, hits), cosines in zip(found, cosines_of(embeddings, x), strict=True):
        assert len(hits) == 4
        assert_nearest(hits, cosines, names)
        assert all(class_name == Path(name).parts[1] for _, name, class_name in hits)
    assert found[0][1][0] == ["1.00", "train/across/3.png", "across"]

    page = out.read_text()
    assert "http" not in page and "light dark" in page
    assert page.count("<img") == page.count("data:image/jpeg") == 2 + 2 * 4
    links = [queries[0], queries[1], *(images / name for _, hits in found for _, name, _ in hits)]
    assert sorted(re.findall(r'href="(file:[^"]+)"', page)) == sorted(p.as_uri() for p in links)


def test_a_folder_is_searched_and_k_may_be_larger_than_it(finished, images, tmp_path):
    folder = shutil.copytree(images / "test", tmp_path / "x & y")
    query = folder / "down" / "2.png"
    argv = ["search", "--exp_dir", finished, "--images", folder, "--query", query, "--k", 99]
    result = run(*argv, "--out", tmp_path / "x.html")
    ((_, hits), _) = hits_of(result.out)
    encoder = emp_ssl.load(finished)
    names = [f"{name}/{i}.png" for name in ("across", "down") for i in range(5)]
    x, _ = encoder.embed([folder / name for name in names])
    query, _ = encoder.embed([query])
    assert_nearest(hits, cosines_of(query.numpy(), x.numpy())[0], names)
    assert len(hits) == 10 and hits[0] == ["1.00", "down/2.png"]
    assert "x%20%26%20y/down/2.png" in (tmp_path / "x.html").read_text()


def test_images_that_are_no_files_are_named_by_split_and_index(tmp_path):
    options = "train --dataset textures --n_images 30 --bs 10 --n_epochs 0 --arch resnet18-tiny"
    options += " --h_dim 8 --z_dim 4 --input_size 16 --test_patches 4 --n_eval_epochs 1"
    assert run(*options.split(), "--log_folder", tmp_path / "logs").code == 0
    (exp_dir,) = (tmp_path / "logs").iterdir()
    index = files.read_pt(exp_dir / "artifacts" / "train.pt")["indices"][7]
    images = Images(Run(exp_dir).read_hparams())
    pixels = images["train"].images[7]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "query.png")
    argv = ["search", "--exp_dir", exp_dir, "--query", tmp_path / "query.png", "--k", 2]
    result = run(*argv, "--out", tmp_path / "x.html")
    assert (result.code, result.err) == (0, "")
    assert re.search(rf"^  1\.00 train image {int(index)}  \w+", result.out, re.M)
    assert (tmp_path / "x.html").read_text().count("data:image/jpeg") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--query no.png", "no.png (FileNotFoundError)"),
        ("--query QUERY --k 0", "from 1"),
        ("--query QUERY --out no/x.html", "must be a file NAME.html"),
        ("--query QUERY --images no", "images no is not a folder"),
    ],
)
def test_what_search_refuses(finished, images, options, words):
    query = str(images / "test" / "down" / "0.png")
    argv = options.replace("QUERY", query).split()
    result = run("search", "--exp_dir", finished, *argv)
    assert refused(result, 1 if "no.png" in options else 2, words)


def test_a_run_that_is_not_finished_is_refused(copy, images):
    (copy / "artifacts" / "test.pt").unlink()
    query = images / "test" / "down" / "0.png"
    result = run("search", "--exp_dir", copy, "--query", query)
    assert refused(result, 2, "is not finished, or was edited since: resume it first")
