"""Quantization schemes: how one linear layer's weight becomes a few small tensors, and back.

A scheme is one file with five functions (`Format`); the table at the end gives it its name. Weights only: the reference
`linear` dequantizes the layer, uses it and drops it (w8a16). That costs one layer of scratch memory and, at the token
counts of a video, under 1 % of the product's time. Products in 8 bits: `compute.py`.

Invariants: a weight is always 2-D, [out, in]; arithmetic is float32 inside and independent of how the weight is cut
into pieces; the dtype of the stored `weight` names its scheme, so a file can mix schemes and layers left as they are.
Errors are relative L2 on Gaussian weights: int8 0.9 %, fp8 2.65 %, nf4 9.2 %.

To add a scheme: write `kernels/<scheme>.py`, add a line to SCHEMES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.kernels import fp8, int8, nf4

Parts = dict[str, Tensor]
"""The stored tensors of one weight, by suffix: `<layer>.<suffix>`."""

Shape = tuple[int, int]


class Format(Protocol):
    """What the file of a scheme defines; `QuantScheme` says what the functions do."""

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]: ...
    def quantize(self, weight: Tensor, name: str) -> Parts: ...
    def dequantize(self, parts: Parts, dtype: torch.dtype, shape: Shape, rows: slice = ...) -> Tensor: ...
    def layer_markers(self) -> Parts: ...
    def file_markers(self, component: str) -> Parts: ...


@dataclass(frozen=True)
class QuantScheme:
    """One way to store a weight."""

    name: str
    format: Format

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the stored `weight`; no two schemes share it."""
        return self.parts(1, 1)["weight"][1]

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """suffix -> (shape, dtype) of what is stored for a weight of this size."""
        return self.format.parts(out_features, in_features)

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        """weight [out, in], any float dtype and device -> its parts, there.

        Scratch memory is under 128 MiB. Raises CheckpointError with `name` if a value is infinite or not a number.
        """
        return self.format.quantize(weight, name)

    def dequantize(self, parts: Parts, dtype: torch.dtype, shape: Shape, rows: slice = slice(None)) -> Tensor:
        """The weight, `shape` = (out, in), rounded once from float32 to `dtype`; or consecutive rows of it.

        Nothing waits for the device. Scratch memory beside the result, with `dtype` on a GPU or float32 on a CPU:
        none, or `compute.scratch`.
        """
        return self.format.dequantize(parts, dtype, shape, rows)

    def linear(self, x: Tensor, parts: Parts, bias: Tensor | None, shape: Shape) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, as by a linear layer with the dequantized weight.

        Differentiable with respect to x.
        """
        return F.linear(x, self.dequantize(parts, x.dtype, shape), bias)

    def layer_markers(self) -> Parts:
        """Tensors that other programs want beside each quantized weight, by suffix. This program ignores them."""
        return self.format.layer_markers()

    def file_markers(self, component: str) -> Parts:
        """Tensors that other programs want once in a component's file, by name. This program ignores them."""
        return self.format.file_markers(component)


SCHEMES = {
    "int8": QuantScheme("int8", int8),
    "fp8": QuantScheme("fp8", fp8),
    "nf4": QuantScheme("nf4", nf4),
}
MARKERS = ("comfy_quant", "scaled_fp8")


def scheme_of_dtype(dtype: torch.dtype) -> QuantScheme | None:
    """The scheme whose `weight` is stored in this dtype; None for an ordinary one."""
    return next((scheme for scheme in SCHEMES.values() if scheme.weight_dtype == dtype), None)


def is_marker(name: str) -> bool:
    """Whether a tensor of this name is only there for other programs."""
    return name.rpartition(".")[2] in MARKERS
