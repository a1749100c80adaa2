"""A linear layer whose weight stays quantized, and how it takes the place of an ordinary one.

Invariants: the layer's state is what the file holds, tensor for tensor; nothing is trained in it; which layers are
replaced is the caller's decision (the checkpoint's, from the file's dtypes), so `dit` and `text` know no quantization.
Whoever calls a layer many times with the same weight opens it first (`opened`), quantized or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.kernels import compute, w8a8
from lowvram_i2v.kernels.scheme import Parts, QuantScheme
from lowvram_i2v.kernels.w8a8 import OpenWeight


@dataclass(frozen=True)
class Opened:
    """A linear layer ready for many calls with the same weight: x [tokens, in] of `dtype` -> [tokens, out] of it.

    weight: [out, in] in `dtype`; or the stored codes, then the layer multiplies 8-bit rows, and who makes its rows may
    hand them to the ops of `ops.py` in that form (`codes`, `stored`).
    """

    weight: Tensor | OpenWeight
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def codes(self) -> torch.dtype | None:
        """Of the rows that the layer multiplies: the dtype of their codes, None for rows as they are."""
        return self.weight.codes.dtype if isinstance(self.weight, OpenWeight) else None

    @property
    def stored(self) -> OpenWeight:
        """The weight of a layer that has `codes`."""
        assert isinstance(self.weight, OpenWeight)
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.linear(x, self.weight, self.bias)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("8-bit products have no derivative: train with the compute w8a16")
        with torch.no_grad():
            return w8a8.linear(x, self.weight, self.dtype)


class QuantLinear(nn.Module):
    """Buffers named by the scheme's suffixes, and `bias` like a linear layer's."""

    bias: Tensor | None

    def __init__(self, scheme: QuantScheme, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.scheme = scheme
        self.compute = "w8a16"
        self.in_features, self.out_features = in_features, out_features
        self.suffixes = tuple(scheme.parts(out_features, in_features))
        for suffix, (shape, dtype) in scheme.parts(out_features, in_features).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def parts(self) -> Parts:
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype. With w8a16, differentiable with respect to x."""
        return opened(self, x.dtype)(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme.name}, {self.compute}"
        )


def opened(layer: nn.Module, dtype: torch.dtype, rows: slice = slice(None)) -> Opened:
    """A linear layer made ready for many calls with the same weight, on x [tokens, in] of `dtype`, the result's too.

    A quantized weight is dequantized once, or in w8a8 not at all; what that takes (`compute.scratch`) is free again
    when the result is dropped. The layer's weight must stay in place as long. rows: consecutive output features.
    """
    if not isinstance(layer, QuantLinear):
        assert isinstance(layer, nn.Linear)
        return _opened(layer.weight[rows].to(dtype), layer.bias, rows)
    first, end, step = rows.indices(layer.out_features)
    assert step == 1
    if compute.is_8_bit(layer.scheme.name, layer.compute, (end - first, layer.in_features)):
        return Opened(w8a8.prepared(layer.scheme.name, layer.parts(), layer.bias, rows), None, dtype)
    shape = (layer.out_features, layer.in_features)
    return _opened(layer.scheme.dequantize(layer.parts(), dtype, shape, rows), layer.bias, rows)


def _opened(weight: Tensor, bias: Tensor | None, rows: slice) -> Opened:
    return Opened(weight, None if bias is None else bias[rows].to(weight.dtype), weight.dtype)


def set_compute(module: nn.Module, name: str, only: Callable[[str], bool] = lambda layer: True) -> None:
    """Sets how the quantized layers in a module multiply, by a name in `compute.COMPUTES`.

    only: which of them, by their names below the module; the others keep what they have, at first w8a16. Layers called
    with a few rows, whose errors all tokens share, are best left out of w8a8: modulation.

    Raises RequestError for an unknown name. Whether the card can is `compute.refusal`'s to say, before.
    """
    compute.check(name)
    for path, layer in module.named_modules():
        if isinstance(layer, QuantLinear) and only(path):
            layer.compute = name


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
