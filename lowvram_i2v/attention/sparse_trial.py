"""Sparse attention tried on this device: a thousand tokens, against the same lists of blocks in float32.

How far sparse attention is from dense is the video's matter and no fault; that it computes what it says is checked
here, for the self-test before a run and for `check-kernels`.
"""

from __future__ import annotations

from functools import partial

import torch

from lowvram_i2v.attention import Layout
from lowvram_i2v.attention.triton_sparse import attend
from lowvram_i2v.kernels import attention_cases, attention_route
from lowvram_i2v.kernels.attention_cut import Cut, cut_sequence
from lowvram_i2v.kernels.attention_reference import relative_l2
from lowvram_i2v.kernels.attention_tiles import INT8

DENSITY = 0.4
LAYOUT = Layout(first_tokens=70, image_tokens=1000, text_tokens=53, step=0, steps=1)
LIMIT = 0.08
"""Largest relative L2 error: what 8 bits may cost, see `attention_cases`."""


def error(device: torch.device, head_dim: int, dtype: torch.dtype) -> float:
    """Relative L2 distance of `triton-sparse` from its definition. Waits for the device."""
    tokens = LAYOUT.image_tokens + LAYOUT.text_tokens
    case = attention_cases.CASES["peaked"]
    given = attention_cases.inputs(case, tokens, attention_cases.HEADS, head_dim, device, dtype)
    q, k, v = (x.float() for x in given)
    exact = attention_route.attend(q, k, v, _cut(device, tokens))
    return relative_l2(attend(*given, layout=LAYOUT, density=DENSITY), exact)


def fault(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None."""
    off = error(device, head_dim, dtype)
    return None if off <= LIMIT else f"its self-test (sparse) is off by {off:.1%}, {LIMIT:.1%} is right"


def _cut(device: torch.device, tokens: int) -> Cut:
    """As the backend cuts the sequence on that device."""
    cut = partial(cut_sequence, tokens, LAYOUT.first_tokens, LAYOUT.image_tokens, DENSITY)
    if device.type != "cuda":
        return cut()
    from lowvram_i2v.kernels.attention_launch import card

    tile = INT8[card(device)][0]
    return cut(tile.rows, tile.keys)
