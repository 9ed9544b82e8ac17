"""The losses of EMP-SSL: pure functions on z (P, B, d), unit vectors of P patches of each of B images."""

import math

import torch


def tcr_loss(z, eps=0.2):
    """Total coding rate, negated: minus the mean over patches of ½ logdet(I + d / (B eps) Z_pᵀ Z_p).

    z: (P, B, d) unit vectors, any float dtype. Returns a float32 (or float64) scalar.
    Raises ValueError unless z has three dimensions.
    Source: arXiv 2304.03977, equation 2, with eps in place of the paper's eps² as in the authors' code.
    """
    _, B, d = _shape(z)
    with torch.autocast(z.device.type, enabled=False):
        z = _at_least_float32(z)
        return -HalfLogDet.apply(z if B <= d else z.mT, d / (B * eps)).mean()  # Sylvester: the smaller matrix serves


class HalfLogDet(torch.autograd.Function):
    """½ logdet(I + c z zᵀ) of each z (n, d) in a batch (P, n, d) -> (P,), with its gradient c (I + c z zᵀ)⁻¹ z.

    Autograd's own way, through the gradient of the Cholesky factor, takes 1.5x as long (20 x 100 x 1024, two cores).
    """

    @staticmethod
    def forward(ctx, z, c):
        eye = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
        L = torch.linalg.cholesky_ex(torch.baddbmm(eye, z, z.mT, alpha=c)).L  # (P, n, n)
        ctx.save_for_backward(z, L)
        ctx.c = c
        return L.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # ½ logdet(L Lᵀ) = Σ log L_ii

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, L = ctx.saved_tensors
        eye = torch.eye(L.shape[-1], device=L.device, dtype=L.dtype)
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        return (ctx.c * grad)[:, None, None] * (inverse.mT @ inverse) @ z, None


def invariance_loss(z):
    """Minus the mean cosine between each patch and the mean z̄ of its image's patches.

    z: (P, B, d) unit vectors, any float dtype. Returns a scalar in [-1, 0].
    Raises ValueError unless z has three dimensions.
    Source: arXiv 2304.03977, equation 3. On unit vectors mean_p cos(z_p, z̄) = ‖z̄‖² / ‖z̄‖ = ‖z̄‖.
    """
    _shape(z)
    return -_at_least_float32(z).mean(0).norm(dim=-1).mean()


def vonmises_loss(z, t=2.0):
    """Log of the mean pairwise Gaussian potential between the images' mean embeddings.

    z: (P, B, d) unit vectors, any float dtype; the means z̄ (B, d) are not normalised again. Returns
    log mean_{i<j} exp(-t ‖z̄_i - z̄_j‖²), a scalar: 0 when all images coincide, lower the more they spread.
    Raises ValueError unless z has three dimensions and B is at least 2.
    Source: arXiv 2005.10242, section 4.1.2 (uniformity).
    """
    _, B, _ = _shape(z)
    if B < 2:
        raise ValueError("vonmises_loss compares images with each other: it needs at least 2 of them in a batch")
    with torch.autocast(z.device.type, enabled=False):
        mean = _at_least_float32(z).mean(0)  # (B, d)
        square = mean.square().sum(1)
        i, j = torch.triu_indices(B, B, 1, device=z.device)
        distance = (square[:, None] + square - 2 * mean @ mean.T)[i, j]  # ‖z̄_i - z̄_j‖², (B (B - 1) / 2,)
        return distance.mul(-t).logsumexp(0) - math.log(len(distance))


def _shape(z):
    if z.ndim != 3:
        raise ValueError(f"z must have shape (patches, images, z_dim), not {tuple(z.shape)}")
    return z.shape


def _at_least_float32(z):
    return z if z.dtype == torch.float64 else z.float()
