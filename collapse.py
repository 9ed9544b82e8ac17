"""Signs of collapse: the effective rank, alignment and uniformity of representations."""

import torch
import torch.nn.functional as F

FEW_DIMENSIONS = 5  # dimensions; trained encoders have 50 to 300 of 256 to 1,024
NO_SPREAD = -0.005  # uniformity; of a collapsed projection it is -0.00, trained ones have -0.7 and less


def effective_rank(x):
    """Return the effective rank of x (N, d): exp of the entropy of its singular values, divided by their sum.

    1 if all rows are multiples of one, at most min(N, d). In float64.
    Source: RankMe, arXiv 2210.02885, equations 1 and 2.
    """
    x = x.double()
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # its eigenvalues are the squares of the singular values
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(p).sum().exp())


def alignment(z):
    """Return the mean squared distance between two views of the same image, of unit vectors z (N, V, d), V >= 2.

    0 if all views of an image are the same, at most 4. Source: arXiv 2005.10242, equation 4 with alpha 2.
    """
    V = z.shape[1]
    similarity = torch.einsum("nvd,nwd->nvw", z, z)  # (N, V, V)
    same = similarity.diagonal(dim1=1, dim2=2).sum()
    return float(2 - 2 * (similarity.sum() - same) / (len(z) * V * (V - 1)))


def uniformity(z):
    """Return the log of the mean of exp(-2 squared distance) between different rows of unit vectors z (N, d).

    0 if all rows are the same, or there is one; about -4 if they are spread evenly over the sphere.
    Source: arXiv 2005.10242, equation 5 with t 2.
    """
    return float(F.pdist(z).square().mul(-2).exp().mean().log()) if len(z) > 1 else 0.0


def signs(embeddings, z):
    """Return {"rank", "alignment", "uniformity"} of embeddings (N, d) and of the projections z (N, V, d) of their views."""
    z = F.normalize(z.float(), dim=2)
    return {"rank": effective_rank(embeddings), "alignment": alignment(z), "uniformity": uniformity(z[:, 0])}


def told(found):
    """Return the signs as the log has them."""
    return f"rank {found['rank']:.1f} alignment {found['alignment']:.3f} uniformity {found['uniformity']:.2f}"


def advice(found):
    """Return "" or, if the representations or their projections have collapsed, what to do."""
    if found["rank"] >= FEW_DIMENSIONS and found["uniformity"] <= NO_SPREAD:
        return ""
    return (f"collapsed (rank below {FEW_DIMENSIONS}, or uniformity above {NO_SPREAD}): if it stays so, train longer or lower "
            f"invariance_loss_weight")  # fmt: skip
