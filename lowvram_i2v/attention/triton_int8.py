"""8-bit attention by our Triton kernels: scores in int8, P V in e4m3 (fp16 on RTX 30). CUDA only; `out` may be q.

Beside the result it allocates the codes of K and V: 2 bytes for each of their dim * tokens * heads (3 on RTX 30).
"""

from __future__ import annotations

from torch import Tensor

from lowvram_i2v.kernels.attention_int8 import attend_quantized
from lowvram_i2v.kernels.attention_launch import card
from lowvram_i2v.kernels.attention_quantize import quantize
from lowvram_i2v.kernels.attention_tiles import INT8


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim]."""
    tile = INT8[card(q.device)][0]
    return attend_quantized(q, quantize(k, v, tile), tile, out)
