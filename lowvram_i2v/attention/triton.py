"""Exact 16-bit attention by our Triton kernel. CUDA only; `out` may be q, so that a workspace needs no extra buffer."""

from __future__ import annotations

from torch import Tensor

from lowvram_i2v.kernels.attention_dense import attend as attend_dense
from lowvram_i2v.kernels.attention_launch import card
from lowvram_i2v.kernels.attention_tiles import DENSE


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim]."""
    return attend_dense(q, k, v, DENSE[card(q.device)][0], out)
