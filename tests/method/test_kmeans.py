"""The opponent of benchmarks/kmeans.py, against sklearn and plain loops."""

import pytest
import torch
from helpers import pictures
from sklearn.cluster import KMeans

from benchmarks import kmeans
from infra import files
from infra.device import generator


def test_whitening_makes_the_covariance_the_unit_matrix():
    x = (
        torch.randn(5000, 6, generator=generator(0, "test"))
        @ torch.diag(torch.tensor([1.0, 2, 5, 10, 20, 50]))
        + 7
    )
    mean, W = kmeans.whitening(x)
    torch.testing.assert_close(((x - mean) @ W).T.cov(), torch.eye(6), atol=0.15, rtol=0)
    torch.testing.assert_close(W, W.T)  # ZCA, not PCA


def test_centroids_are_those_of_sklearn():
    """Of unit vectors around three axes, spherical k-means and k-means find the same clusters."""
    axes = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, -1, 1]]), dim=1
    )
    x = axes.repeat(200, 1) + 0.05 * torch.randn(600, 4, generator=generator(1, "test"))
    x = torch.nn.functional.normalize(x, dim=1)
    centroids = kmeans.spherical_kmeans(x, 3, generator(2, "test"))
    wanted = torch.tensor(KMeans(3, n_init=5, random_state=0).fit(x.numpy()).cluster_centers_)
    wanted = torch.nn.functional.normalize(wanted, dim=1)
    cosines = centroids @ wanted.T
    assert (cosines.amax(1) > 0.9999).all() and len(set(cosines.argmax(1).tolist())) == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_features_are_those_of_a_loop_over_the_patches(dtype, tolerance):
    images = pictures(2)[:, :, :12, :12].contiguous()
    mean, W = kmeans.whitening(kmeans.patches_of(images).flatten(0, 1))
    centroids = torch.nn.functional.normalize(
        torch.randn(5, 108, generator=generator(3, "test")), dim=1
    )
    for image, row in zip(
        images.double(), kmeans.quadrant_features(images, mean, W, centroids, dtype), strict=True
    ):
        quadrants = torch.zeros(2, 2, 5, dtype=torch.float64)
        for i in range(7):
            for j in range(7):
                patch = image[:, i : i + 6, j : j + 6].flatten()
                patch = (patch - patch.mean()) / (patch.var() + 10).sqrt()
                distance = ((patch - mean) @ W.double() - centroids).norm(dim=1)
                quadrants[i // 4, j // 4] += (distance.mean() - distance).clamp(min=0)
        error = (row.double() - quadrants.flatten()).norm() / quadrants.norm()
        assert error < tolerance


def test_the_command_learns_and_keeps_its_rows(images, tmp_path, monkeypatch):
    """Of two classes that differ by the direction of their stripes; a second run adds a row."""
    monkeypatch.setattr(kmeans, "N_PATCHES", 5000)
    for _ in range(2):
        words = ["--data_dir", images, "--n_centroids", 8, "--n_eval_epochs", 20, "--out", tmp_path]
        kmeans.main(map(str, words))
    rows = files.read_json(tmp_path / "kmeans.json")["rows"]
    assert [row["n_centroids"] for row in rows] == [8, 8]
    assert rows[0]["top1"] == rows[1]["top1"] >= 90 and rows[0]["n_images"] == 24
    assert rows[0]["seconds"] > 0 and rows[0]["machine"]["cores"] and rows[0]["commit"]
