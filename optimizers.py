"""The optimizer of a run, its learning rate and its momenta; and Muon."""

import math

import torch

from infra.errors import UsageError
from lars import LARS, is_scaled

# Coefficients (a, b, c) of X <- a X + (b A + c A²) X, A = X Xᵀ. Each minimises the greatest
# |1 - p(x)|, p(x) = a x + b x³ + c x⁵, over the interval that the steps before it map [.01, 1] to.
# They end as near 1 as five steps of (3.4445, -4.7750, 2.0315), and take two thirds of the time.
POLYNOMIALS = (
    (8.0934, -23.6205, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent with orthogonalised Nesterov momentum.

    Tensors of two or more dimensions are taken as matrices (out, rest):

        m <- momentum m + g
        U = orthogonalised(g + momentum m)
        q = p - lr (‖p‖ / ‖U‖) U
        p <- (‖p‖ / ‖q‖) q

    So a step turns each of them by up to about `lr` radians, and keeps its length. Without the
    second line of the update, the weights of --preset laptop grow by a factor of a million in 939
    steps. 1-D tensors take the step of torch.optim.SGD with Nesterov momentum and the rate
    lr * lr_1d. There is no weight decay. bf16: compute the matrix products in bfloat16. The host
    never waits. The layer (n, k), n <= k, costs about 20 n² k + 10 n³ operations a step.
    Source: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, params, lr, momentum=0.95, lr_1d=10.0, bf16=False):
        defaults = dict(lr=lr, momentum=momentum, lr_1d=lr_1d, bf16=bf16)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """Update the parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p, group):
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        m = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
        update = p.grad.add(m, alpha=group["momentum"])
        if not is_scaled(p):
            p.sub_(update, alpha=group["lr"] * group["lr_1d"])
            return
        dtype = torch.bfloat16 if group["bf16"] else torch.float32
        U = orthogonalised(update.flatten(1), dtype)
        p_norm = p.norm()
        scale = torch.where(p_norm == 0, 1, p_norm) / (U.norm() + 1e-8)
        p.sub_(U.view_as(p) * scale, alpha=group["lr"])
        p.mul_(torch.where(p_norm == 0, 1, p_norm / p.norm()))


def orthogonalised(M, dtype=torch.float32):
    """Return about U Vᵀ of the singular value decomposition M = U S Vᵀ, float32.

    M: a matrix (n, k). Singular values of at least a hundredth of its norm become 0.73 to 1.27.
    Zeros stay zeros.
    Source: arXiv 2505.16932, which composes polynomials so; the degree and number are ours.
    """
    wide = M.shape[0] <= M.shape[1]
    X = (M if wide else M.T) / (M.norm() + 1e-8)  # (n, k), n <= k; singular values up to 1
    X = X.to(dtype)
    for a, b, c in POLYNOMIALS:
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=b, alpha=c)  # b A + c A²
        X = torch.addmm(X, B, X, beta=a)  # a X + B X
    return (X if wide else X.T).float()


def build_optimizer(hp, encoder, bf16=False):
    """Return the optimizer of a run, over the weights that are not frozen."""
    params = [p for p in encoder.parameters() if p.requires_grad]
    sgd = {"momentum": 0.9, "weight_decay": hp.weight_decay, "nesterov": True}
    if hp.optimizer == "muon":
        return Muon(params, hp.lr, bf16=bf16)
    if hp.optimizer == "adamw":
        return torch.optim.AdamW(params, hp.lr, weight_decay=hp.weight_decay)
    if hp.optimizer == "sgd":
        return torch.optim.SGD(params, hp.lr, **sgd)
    return LARS(params, hp.lr, eta=0.005, clip=True, **sgd)  # the authors' trust coefficient


def learning_rate(hp, progress):
    """Return the learning rate of a step; progress in [0, 1) is the share of steps before it."""
    if hp.schedule == "constant":
        return hp.lr
    return hp.lr * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer, lr):
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def load_momenta(optimizer, momenta):
    """Load the momenta of a checkpoint. Raises UsageError if they do not fit the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {i: {p.shape} for i, p in enumerate(params)}
    shapes = {
        i: {value.shape for value in entry.values() if value.ndim} for i, entry in momenta.items()
    }
    if momenta and shapes != expected:
        raise UsageError("the momenta of the checkpoint do not fit its weights")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": momenta})
