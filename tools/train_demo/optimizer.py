"""What turns gradients into steps: Muon for the weight matrices of the layers in the middle, AdamW for all others.

Muon (Keller Jordan 2024, "Muon: an optimizer for hidden layers in neural networks") moves a matrix by its momentum with
all singular values set to about one, found by Newton and Schulz's iteration; so no direction of a layer waits for
another. The step has the root mean square of one of AdamW (Liu et al. 2025, arXiv:2502.16982), so one learning rate
serves both. A convolution's weight [out, in, ...] counts as the matrix [out, in * ...].

Tables, vectors and the layers named in OUTER stay with AdamW: their rows are no directions of one space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM, BETAS = 0.95, (0.9, 0.99)
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # x -> a x + b x^3 + c x^5 takes singular values in 0..1 towards 1
MATCHED = 0.2  # root mean square of an AdamW step at learning rate 1, about
OUTER = ("conv_in.", "conv_out.", "img_in.", "final_layer.", "embed", "position")
"""Parts of names: what touches pixels, latents or words."""


class Muon(torch.optim.Optimizer):
    """Parameters of two and more dimensions. Those of one shape are moved together."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(matrices), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            matrices = group["params"]
            for matrix, momentum in zip(matrices, self._momenta(matrices), strict=True):
                shapes.setdefault((len(matrix), matrix[0].numel()), []).append((matrix, momentum))
            for (rows, columns), pairs in shapes.items():
                moved = orthogonal(torch.stack([momentum.reshape(rows, columns) for _, momentum in pairs]))
                size = MATCHED * math.sqrt(max(rows, columns))
                alike = [matrix.view(rows, columns) for matrix, _ in pairs]
                torch._foreach_add_(alike, list(moved.to(alike[0].dtype).unbind()), alpha=-group["lr"] * size)

    def _momenta(self, matrices: list[Tensor]) -> tuple[Tensor, ...]:
        """Of the gradients up to now, looking one step ahead (Nesterov)."""
        for matrix in matrices:
            if matrix not in self.state:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[one]["momentum"] for one in matrices]
        gradients = [one.grad for one in matrices if one.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return tuple(torch._foreach_lerp(gradients, momenta, MOMENTUM))


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> nearly the nearest matrices whose singular values are all one; bfloat16 on a GPU."""
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if tall else x
    return result


def optimizers(parameters: dict[str, nn.Parameter], rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """For named parameters. muon: whether matrices in the middle go with Muon."""
    inner: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        is_inner = muon and parameter.ndim > 1 and not any(part in name for part in OUTER)
        (inner if is_inner else others).append(parameter)
    fused = others[0].device.type == "cuda"
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, betas=BETAS, weight_decay=0.0, fused=fused)]
    return [*made, Muon(inner, rate)] if inner else made
