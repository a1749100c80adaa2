"""nf4: 4-bit indices into a table of 16 values, one scale for every 64 weights. For machines with little RAM.

    weight  U8   [ceil(out * in / 2), 1]   two indices a byte, the first in the high bits
    absmax  F32  [ceil(out * in / 64)]     largest |w| of each block
    w = TABLE[index] * absmax of its block

The weight is one flat run of values, row after row, cut into blocks of 64: a block may span rows, the last may be
shorter, and an odd number of values leaves half a byte unused (index 7, the zero). The table holds quantiles of a
normal distribution, scaled to -1..1 with an exact 0, so that Gaussian weights use all 16 about equally often (QLoRA,
arXiv 2305.14314). Half a byte, and 4 bytes a block, make 4.5 bits a weight; the error is 9.2 % in relative L2.

Who reads it: the format is bitsandbytes' (4-bit "nf4", block size 64, scales not quantized again), and so are the bits:
indices, scales and dequantized values equal those of its `quantize_4bit` and `dequantize_4bit` on a CPU. For that, a
whole block is multiplied by the reciprocal of its scale where the last, shorter one is divided; a block of zeros keeps
scale 0, and in the shorter one 1e-38.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.kernels.chunks import absmax, row_chunks

BLOCK = 64
TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
SMALLEST = 1e-38  # what a smaller scale counts as; the library's own constant


def parts(out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    values = out_features * in_features
    return {
        "weight": ((-(-values // 2), 1), torch.uint8),
        "absmax": ((-(-values // BLOCK),), torch.float32),
    }


def quantize(weight: Tensor, name: str) -> dict[str, Tensor]:
    flat = weight.reshape(-1)
    whole = len(flat) // BLOCK
    made = {
        suffix: torch.empty(shape, dtype=dtype, device=weight.device)
        for suffix, (shape, dtype) in parts(*weight.shape).items()
    }
    packed, scales = made["weight"][:, 0], made["absmax"]
    for blocks in row_chunks(whole, BLOCK):
        values = flat[blocks.start * BLOCK : blocks.stop * BLOCK].view(-1, BLOCK).float()
        largest = absmax(values, name, dim=1)
        scales[blocks] = largest[:, 0]
        packed[blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2] = _packed(
            values * (1.0 / largest.clamp_min(SMALLEST))
        )
    if len(flat) > whole * BLOCK:
        values = flat[whole * BLOCK :].float()
        scales[whole] = absmax(values, name).clamp_min(SMALLEST)
        packed[whole * BLOCK // 2 :] = _packed(values / scales[whole])
    return made


def dequantize(
    parts: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, int], rows: slice = slice(None)
) -> Tensor:
    packed, scales, pairs = parts["weight"].view(-1), parts["absmax"], _pairs(parts["weight"].device)
    first, end, _ = rows.indices(shape[0])
    weight = torch.empty((end - first, shape[1]), dtype=dtype, device=packed.device)
    flat, start, stop = weight.view(-1), first * shape[1], end * shape[1]  # of the run of values, these are wanted
    begin = start // BLOCK
    for piece in row_chunks(-(-stop // BLOCK) - begin, BLOCK):
        blocks = slice(begin + piece.start, begin + piece.stop)
        at, to = blocks.start * BLOCK, blocks.stop * BLOCK
        values = pairs.index_select(0, packed[at // 2 : to // 2].int()).view(-1)
        _scale(values, scales[blocks])
        low, high = max(at, start), min(to, stop)
        flat[low - start : high - start] = values[low - at : high - at]
        del values  # before the next are made
    return weight


def layer_markers() -> dict[str, Tensor]:
    return {}


def file_markers(component: str) -> dict[str, Tensor]:
    return {}


def _packed(scaled: Tensor) -> Tensor:
    """Values in -1..1, any shape -> indices of the nearest table values, two a byte. A tie takes the lower one."""
    table = torch.tensor(TABLE, device=scaled.device)
    between = (table[1:] + table[:-1]) / 2
    indices = torch.bucketize(scaled.clamp(-1, 1).view(-1), between, out_int32=True).to(torch.uint8)
    if len(indices) % 2:
        indices = F.pad(indices, (0, 1), value=TABLE.index(0.0))
    return (indices[0::2] << 4) | indices[1::2]


def _scale(values: Tensor, scales: Tensor) -> None:
    """Multiplies each block of a run of values, of which the last may be shorter, by its scale."""
    whole = len(values) // BLOCK
    values[: whole * BLOCK].view(-1, BLOCK).mul_(scales[:whole, None])
    if whole < len(scales):
        values[whole * BLOCK :].mul_(scales[whole])


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2] float32: a byte is looked up once. Made of constants, because a table from
    the host would be waited for; and not while inference mode is on, to be of use outside of it."""
    with torch.inference_mode(False):
        table = torch.stack([torch.full((), value, device=device) for value in TABLE])
        byte = torch.arange(256, device=device)
        return torch.stack([table[byte >> 4], table[byte & 15]], dim=1)
