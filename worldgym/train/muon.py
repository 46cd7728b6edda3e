"""Muon (Jordan et al., 2024) in the precision of its matrices.

``torch.optim.Muon`` orthogonalises in bfloat16: slow on CPUs, and so coarse that the rounding of a
gradient that was summed over two processes changes the next loss in its fifth digit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the paper


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """``matrix`` with its singular values brought near 1 (0.7 to 1.2).

    >>> torch.linalg.svdvals(orthogonal(torch.diag(torch.tensor([3.0, 1.0, 0.3])))).round().tolist()
    [1.0, 1.0, 1.0]
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised, scaled to the size of AdamW's updates.

    Args:
        params: matrices.
        lr: learning rate, on AdamW's scale.
        weight_decay: decoupled, as in AdamW.
        momentum: of Nesterov's kind.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0,
                 momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(buffer, momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-0.2 * lr * max(p.shape) ** 0.5)
