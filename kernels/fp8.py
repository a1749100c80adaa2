"""fp8: 8-bit floats (e4m3: sign, 4 exponent bits, 3 mantissa bits) with one scale for the whole weight.

    weight        F8_E4M3  [out, in]   w / scale, rounded to the nearest e4m3 number, clamped to -448..448
    scale_weight  F32      []          largest |w| / 448
    w = weight * scale_weight

e4m3 numbers keep three bits behind the leading one wherever they are between 2^-6 and 448, so the relative error is
the same for small and large weights: 2.65 % in relative L2 for Gaussian ones, three times that of int8, which spends
all of its 8 bits on the range that a row uses. The scale matters even so: weights of sigma 0.01 cast without one fall
among the subnormal numbers below 2^-6 and lose 5.7 %. There is no infinity; a cast of numbers above 448 gives 448 or
NaN, depending on the device, so they are clamped first.

Who reads it: every ComfyUI, unchanged ("scaled fp8"), by the tensor `scaled_fp8` in the file: with 2 elements weights
are dequantized before the product, with 0 elements it also runs in fp8. Text encoders must have 0 for old versions.

Products of these codes with 8-bit activations are in `w8a8.py`; a CPU makes them in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_i2v.kernels.chunks import SMALLEST, absmax, row_chunks, scaled

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


def parts(out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"weight": ((out_features, in_features), DTYPE), "scale_weight": ((), torch.float32)}


def quantize(weight: Tensor, name: str) -> dict[str, Tensor]:
    largest = absmax(weight, name)
    # divided by a tensor: by a number, a GPU multiplies with the reciprocal, which is another last bit
    scale = (largest / torch.full_like(largest, LARGEST)).clamp_min_(SMALLEST)
    codes = torch.empty(weight.shape, dtype=DTYPE, device=weight.device)
    for rows in row_chunks(*weight.shape):
        codes[rows] = (weight[rows].float() / scale).clamp_(-LARGEST, LARGEST).to(DTYPE)
    return {"weight": codes, "scale_weight": scale}


def dequantize(
    parts: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, int], rows: slice = slice(None)
) -> Tensor:
    codes, scale = (
        parts["weight"][rows],
        parts["scale_weight"].view(1, 1),
    )  # with no dimension, it would be rounded to dtype
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for piece in row_chunks(*codes.shape):
        scaled(codes[piece], scale, out=weight[piece])
    return weight


def layer_markers() -> dict[str, Tensor]:
    return {}


def file_markers(component: str) -> dict[str, Tensor]:
    """What tells ComfyUI that `scale_weight` counts; the number of elements is the message, the values are not."""
    return {"scaled_fp8": torch.zeros(0 if component == "text_encoder" else 2).to(DTYPE)}
