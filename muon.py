"""Muon: momentum whose matrices are orthogonalised before the step."""

import torch

from lars import is_scaled

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of X <- a X + (b A + c A²) X, A = X Xᵀ


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent with orthogonalised Nesterov momentum.

    Tensors of two or more dimensions are taken as matrices (out, rest):

        m <- momentum m + g
        U = orthogonalised(g + momentum m)
        q = p - lr (‖p‖ / ‖U‖) U
        p <- (‖p‖ / ‖q‖) q

    So a step turns each of them by up to about `lr` radians, and keeps its length. Without the second line, the weights of
    --preset laptop grow by a factor of a million in 939 steps, and overflow in 3,384 steps of supervised training. 1-D tensors
    take the step of torch.optim.SGD with Nesterov momentum and `lr_1d`, as a multiple of lr. There is no weight decay. bf16:
    the matrix products in bfloat16. The host never waits. The layer (n, k), n <= k, costs about 20 n² k + 10 n³ operations a
    step.
    Source: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, params, lr, momentum=0.95, lr_1d=10.0, n_iterations=5, bf16=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, lr_1d=lr_1d, n_iterations=n_iterations, bf16=bf16))

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
        U = orthogonalised(update.flatten(1), group["n_iterations"], torch.bfloat16 if group["bf16"] else torch.float32)
        p_norm = p.norm()
        scale = torch.where(p_norm == 0, 1, p_norm) / (U.norm() + 1e-8)
        p.sub_(U.view_as(p) * scale, alpha=group["lr"])
        p.mul_(torch.where(p_norm == 0, 1, p_norm / p.norm()))


def orthogonalised(M, n_iterations=5, dtype=torch.float32):
    """Return U Vᵀ of the singular value decomposition M = U S Vᵀ, about: singular values between 0.7 and 1.2.

    M: a matrix (n, k). Returns float32. Zeros stay zeros.
    """
    a, b, c = NEWTON_SCHULZ
    wide = M.shape[0] <= M.shape[1]
    X = (M if wide else M.T) / (M.norm() + 1e-8)  # (n, k), n <= k; singular values up to 1
    X = X.to(dtype)
    for _ in range(n_iterations):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A²) X
    return (X if wide else X.T).float()
