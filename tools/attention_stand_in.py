"""8-bit attention in plain torch: what the kernels of `triton-int8` compute, for a machine without a GPU.

It quantizes as they do (`kernels/attention_reference.py`) and then attends in float32, so its error is theirs as far as
the codes make it. It says nothing about speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_i2v.kernels.attention_reference import attention, quantize_keys, quantize_queries

KEYS = 64
"""Of one tile, which share a scale."""
LARGEST = 448.0
"""Of e4m3 codes."""
SMALLEST_SCALE = 2.0**-60


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [tokens, heads, dim] -> the same: scores of int8 codes, values in e4m3. The mean of the keys is taken off
    exactly (no softmax feels it; the kernels' is rounded to bf16, as the keys are, which makes other codes as good as
    these), that of the values is kept exactly."""
    q_codes, q_scale = quantize_queries(q)
    centred = k.float() - k.float().mean(0)
    k_codes, k_scale = quantize_keys(centred, torch.zeros_like(centred[0]), KEYS)
    keys = (k_codes.float() * k_scale.repeat_interleave(KEYS, 1)[..., None])[:, : len(k)].transpose(0, 1)
    centre = v.float().mean(0)
    scale = (v.float() - centre).abs().amax(0).clamp_min(SMALLEST_SCALE) / LARGEST
    values = ((v.float() - centre) / scale).to(torch.float8_e4m3fn).float() * scale + centre
    return attention(q_codes.float() * q_scale[..., None], keys, values).to(q.dtype)
