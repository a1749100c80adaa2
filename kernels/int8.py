"""int8: 8-bit integers with one scale for each output row. The default scheme.

    weight        I8   [out, in]   round(w / scale), in -127..127
    weight_scale  F32  [out, 1]    largest |w| of the row / 127
    w = weight * weight_scale

A row's values lie on 255 evenly spaced points, so the error is that of rounding: uniform within half a step, step /
sqrt(12). For Gaussian rows of 3072 values, whose largest is about 3.5 sigma, that is 0.9 % of the weight in relative
L2. One scale a row commutes with the matrix product, x W^T = (x weight^T) * scale, which is what lets integer tensor
cores run it (every RTX card, at full rate). The codes are symmetric: -128 is never used.

Who reads it: ComfyUI from 0.27 on (each layer says so in a tensor `comfy_quant`); with its tensors renamed it is
optimum-quanto's qint8. That library computes scale and quotient in the weight's own dtype, this file in float32: codes
and scales of a float32 weight are the same bits, those of a bfloat16 weight differ by the rounding of quanto's scale.
A row of zeros has scale 2^-126 here and 0 there.

Products of these codes with 8-bit activations are in `w8a8.py`.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from lowvram_i2v.kernels.chunks import SMALLEST, absmax, row_chunks, scaled

LARGEST = 127


def parts(out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        "weight": ((out_features, in_features), torch.int8),
        "weight_scale": ((out_features, 1), torch.float32),
    }


def quantize(weight: Tensor, name: str) -> dict[str, Tensor]:
    largest = absmax(weight, name, dim=1)
    # divided by a tensor: by a number, a GPU multiplies with the reciprocal, which is another last bit
    scale = (largest / torch.full_like(largest, LARGEST)).clamp_min_(SMALLEST)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(*weight.shape):
        codes[rows] = (weight[rows].float() / scale[rows]).round_()
    return {"weight": codes, "weight_scale": scale}


def dequantize(
    parts: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, int], rows: slice = slice(None)
) -> Tensor:
    codes, scale = parts["weight"][rows], parts["weight_scale"][rows]
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for piece in row_chunks(*codes.shape):
        scaled(codes[piece], scale[piece], out=weight[piece])
    return weight


def layer_markers() -> dict[str, Tensor]:
    """JSON as bytes beside each quantized weight: ComfyUI takes its format from it."""
    text = json.dumps({"format": "int8_tensorwise"}, separators=(",", ":"))
    return {"comfy_quant": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def file_markers(component: str) -> dict[str, Tensor]:
    return {}
