"""Which images to label."""

import torch
import torch.nn.functional as F

from data import rank_in_class


def to_label(embeddings, confidence, n=100, n_clusters=20):
    """Return (rows, clusters) of the n images whose label would help most: int64 (n,) each.

    embeddings: (N, d). confidence: (N,), that of their predicted labels. The images are clustered
    by k-means; the least confident of each cluster is taken, then the second of each, and so on.
    """
    from sklearn.cluster import MiniBatchKMeans

    rows = confidence.argsort(stable=True)
    x = F.normalize(embeddings[rows] - embeddings.mean(0), dim=1)
    kmeans = MiniBatchKMeans(min(n_clusters, len(x)), n_init=3, random_state=0)
    clusters = torch.from_numpy(kmeans.fit_predict(x.numpy())).long()
    chosen = rank_in_class(clusters).argsort(stable=True)[:n]
    return rows[chosen], clusters[chosen]
