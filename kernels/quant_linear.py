"""A linear layer whose weight stays quantized, and how it takes the place of an ordinary one.

Invariants: the layer's state is what the file holds, tensor for tensor; nothing is trained in it; which layers are
replaced is the caller's decision (the checkpoint's, from the file's dtypes), so `dit` and `text` know no quantization.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowvram_i2v.kernels.scheme import QuantScheme


class QuantLinear(nn.Module):
    """Buffers named by the scheme's suffixes, and `bias` like a linear layer's."""

    bias: Tensor | None

    def __init__(self, scheme: QuantScheme, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.scheme = scheme
        self.in_features, self.out_features = in_features, out_features
        self.suffixes = tuple(scheme.parts(out_features, in_features))
        for suffix, (shape, dtype) in scheme.parts(out_features, in_features).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        parts = {suffix: getattr(self, suffix) for suffix in self.suffixes}
        return self.scheme.linear(x, parts, self.bias, (self.out_features, self.in_features))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme.name}"


def swap_linears(module: nn.Module, scheme_of: Callable[[str], QuantScheme | None]) -> None:
    """Replaces, in place, each linear layer for whose name `scheme_of` gives a scheme. New ones are on the meta
    device."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and (scheme := scheme_of(name)) is not None:
            with torch.device("meta"):
                new = QuantLinear(scheme, layer.in_features, layer.out_features, layer.bias is not None)
            module.set_submodule(name, new)


def quantized_parts(module: nn.Module) -> dict[str, torch.dtype]:
    """State dict name -> dtype of all parts of quantized layers: these are loaded as they are, never cast."""
    return {
        f"{name}.{suffix}": getattr(layer, suffix).dtype
        for name, layer in module.named_modules()
        if isinstance(layer, QuantLinear)
        for suffix in layer.suffixes
    }
