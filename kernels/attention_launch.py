"""What every launch of an attention kernel shares: the check of its inputs, and the device."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lowvram_i2v.kernels.attention_tiles import Tile, family

LOG2_E = math.log2(math.e)
DIMS = (32, 64, 128, 256)
"""Channels of a head that the kernels are written for."""


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for what the kernels would compute wrongly. Never waits for the device."""
    if q.shape[1:] != k.shape[1:] or k.shape != v.shape or len(k) == 0:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together")
    if q.shape[2] not in DIMS:
        raise ValueError(f"heads of {q.shape[2]} channels; the kernels know {DIMS}")
    if not q.dtype == k.dtype == v.dtype or q.dtype.itemsize > 4:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}")
    if any(x.stride(2) != 1 for x in (q, k, v)):
        raise ValueError(f"channels must be contiguous: strides {[x.stride() for x in (q, k, v)]}")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch_options(tile: Tile) -> dict[str, int | bool]:
    """What Triton is told beside the kernel's own constants; from 3.10 it fuses multiply and add only when asked."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def card(device: torch.device) -> str:
    """The tiles' name for a CUDA device, as "sm_89". Raises PlatformError for a card that is too old."""
    return family(torch.cuda.get_device_capability(device))
