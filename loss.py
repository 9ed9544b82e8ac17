"""The losses of EMP-SSL, as functions of z (P, B, d): unit vectors of P patches of B images."""

import math

import torch


def tcr_loss(z, eps=0.2):
    """Return the negative total coding rate: -mean_p ½ logdet(I + d / (B eps) Z_pᵀ Z_p).

    z: (P, B, d) unit vectors, any float dtype. Returns a float32 (or float64) scalar.
    Raises ValueError unless z has three dimensions.
    Source: arXiv 2304.03977, equation 2, with eps in place of the paper's eps² as in the authors'
    code.
    """
    _, B, d = _shape(z)
    with torch.autocast(z.device.type, enabled=False):
        z = _at_least_float32(z)
        z = z if B <= d else z.mT  # the smaller matrix, by Sylvester's identity
        return -HalfLogDet.apply(z, d / (B * eps)).mean()


class HalfLogDet(torch.autograd.Function):
    """½ logdet(I + c z zᵀ) for each z of a batch, (P, n, d) -> (P,).

    The gradient is c (I + c z zᵀ)⁻¹ z. Autograd differentiates the Cholesky factor instead, which
    takes 1.5x as long (20 x 100 x 1024, two cores).
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
    """Return minus the mean cosine between each patch and the mean z̄ of its image's patches.

    z: (P, B, d) unit vectors, any float dtype. Returns a scalar in [-1, 0].
    Raises ValueError unless z has three dimensions.
    Source: arXiv 2304.03977, equation 3. On unit vectors mean_p cos(z_p, z̄) = ‖z̄‖² / ‖z̄‖ = ‖z̄‖.
    """
    _shape(z)
    return -_at_least_float32(z).mean(0).norm(dim=-1).mean()


def vonmises_loss(z, t=2.0):
    """Return the log of the mean Gaussian potential between the images' mean embeddings: log
    mean_{i<j} exp(-t ‖z̄_i - z̄_j‖²).

    z: (P, B, d) unit vectors, any float dtype; the means z̄ (B, d) are not normalised again.
    Returns a scalar: 0 if all images coincide, and lower the more they spread.
    Raises ValueError unless z has three dimensions and B is at least 2.
    Source: arXiv 2005.10242, section 4.1.2 (uniformity).
    """
    _, B, _ = _shape(z)
    if B < 2:
        raise ValueError(
            "vonmises_loss compares images with each other: it needs at least 2 of them in a batch"
        )
    with torch.autocast(z.device.type, enabled=False):
        mean = _at_least_float32(z).mean(0)  # (B, d)
        square = mean.square().sum(1)
        i, j = torch.triu_indices(B, B, 1, device=z.device)
        distance = square[:, None] + square - 2 * mean @ mean.T  # ‖z̄_i - z̄_j‖², (B, B)
        distance = distance[i, j]  # (B (B - 1) / 2,)
        return distance.mul(-t).logsumexp(0) - math.log(len(distance))


def contrastive_loss(z, temperature=0.2):
    """Return how similar each patch is to the patches of other images: mean_i log mean_j
    exp(z_i · z_j / temperature), where j runs over all patches of the images that patch i is not
    of.

    z: (P, B, d) unit vectors, any float dtype. Returns a scalar: 1 / temperature if all patches
    coincide, near 0 if those of different images are orthogonal. It holds a matrix (P B, P B).
    Raises ValueError unless z has three dimensions and B is at least 2.
    Source: the denominator of InfoNCE without the positive pairs (arXiv 2110.06848, equation 6),
    with the logarithm inside the mean over the patches (arXiv 2004.11362, equation 2). With
    invariance_loss, which stands for its numerator, it is a decoupled contrastive loss.
    """
    P, B, _ = _shape(z)
    if B < 2:
        raise ValueError("contrastive_loss compares images: it needs at least 2 of them in a batch")
    with torch.autocast(z.device.type, enabled=False):
        z = _at_least_float32(z).flatten(0, 1)  # (P B, d)
        same_image = torch.eye(B, dtype=torch.bool, device=z.device).repeat(P, P)  # (P B, P B)
        logits = (z @ z.T / temperature).masked_fill(same_image, -math.inf)
        return (logits.logsumexp(1) - math.log(P * (B - 1))).mean()


UNIFORMITY = {"tcr": tcr_loss, "vonmises": vonmises_loss, "contrastive": contrastive_loss}


def emp_ssl_loss(
    z, uniformity_loss="tcr", invariance_weight=200.0, uniformity_weight=1.0, bags=1, **options
):
    """Return (total, invariance, uniformity).

    total = invariance_weight * invariance + uniformity_weight * uniformity. z: (P, B, d) unit
    vectors. uniformity_loss: a key of UNIFORMITY; options are passed to that function. bags: split
    the patches of each image into this many bags, each treated as an image of its own; must divide
    P.
    Source: arXiv 2304.03977, section 2; the weights are those of the authors' code.
    """
    P, B, _ = _shape(z)
    z = z.flatten(0, 1).unflatten(0, (P // bags, bags * B))  # (P, B, d) -> (P / bags, bags B, d)
    invariance = invariance_loss(z)
    uniformity = UNIFORMITY[uniformity_loss](z, **options)
    return invariance_weight * invariance + uniformity_weight * uniformity, invariance, uniformity


def loss_of_stages(z, criterion, stage_weight):
    """Return (total, invariance, uniformity), the last two of the last stage.

    total is that of the last stage and stage_weight times those of the stages before it. z:
    (P, B, K, d) of K stages. criterion: z (P, B, d) -> (total, invariance, uniformity).
    """
    *earlier, last = z.unbind(2)
    total, invariance, uniformity = criterion(last)
    for stage in earlier:
        total = total + stage_weight * criterion(stage)[0]
    return total, invariance, uniformity


def _shape(z):
    if z.ndim != 3:
        raise ValueError(f"z must have shape (patches, images, z_dim), not {tuple(z.shape)}")
    return z.shape


def _at_least_float32(z):
    return z if z.dtype == torch.float64 else z.float()
