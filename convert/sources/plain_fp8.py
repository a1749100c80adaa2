"""Weights cast to fp8 without a scale. Readable, but small weights fell among fp8's subnormal numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import Container
from lowvram_i2v.convert.sources.quantization import Decoded

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
NOTICE = (
    "{name}: {count} weights were cast to fp8 without scales. That has cost quality already: a relative error of 3.3 % "
    "for weights of sigma 0.02, 5.7 % for 0.01 and 11.3 % for 0.005, where fp8 with scales has 2.65 % and int8 0.9 %. "
    "Converting cannot bring it back; the bfloat16 weights can."
)


def label(container: Container) -> str | None:
    coded = any(tensor.dtype in CODES for tensor in container.tensors.values())
    return "fp8 cast without scales" if coded else None


def decode(container: Container) -> Decoded:
    """As bfloat16, which holds every fp8 value."""
    cast = {name for name, tensor in container.tensors.items() if tensor.dtype in CODES}
    tensors = {
        name: LazyTensor(tensor.shape, torch.bfloat16, _as_bfloat16(tensor)) if name in cast else tensor
        for name, tensor in container.tensors.items()
    }
    notice = NOTICE.format(name=container.path.name, count=len(cast))
    return Decoded(tensors, label(container) or "", (notice,))


def _as_bfloat16(tensor: LazyTensor) -> Callable[[], Tensor]:
    return lambda: tensor.read().to(torch.bfloat16)
