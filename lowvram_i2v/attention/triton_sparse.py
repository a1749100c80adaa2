"""Block-sparse 8-bit attention: the blocks of keys that matter exactly, their means for the others, dense first steps.

Approximate by more than rounding, so a profile has to name it. On CUDA our Triton kernels; on the CPU the definition in
plain torch, which saves no time and shows what the approximation does to a video.

Beside the result it allocates what `memory.extra_bytes` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lowvram_i2v.attention import AttentionBackend, Layout, sdpa
from lowvram_i2v.kernels import attention_route
from lowvram_i2v.kernels.attention_cut import cut_sequence
from lowvram_i2v.kernels.attention_tiles import INT8


@dataclass(frozen=True)
class Sparse:
    """density: share of the key blocks that a block of queries sees exactly. after: share of the steps that run dense
    first, where an error would last longest."""

    density: float
    after: float

    def __call__(self, layout: Layout) -> AttentionBackend:
        """The backend of one prediction."""
        if layout.step < math.ceil(self.after * layout.steps):
            return dense
        return partial(attend, layout=layout, density=self.density)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None = None,
    *,
    layout: Layout | None = None,
    density: float = 1.0,
) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim]. Without a layout all blocks are seen exactly. Only CUDA
    uses `out`, which may be q."""
    tokens = len(k)
    first, image = (0, tokens) if layout is None else (layout.first_tokens, layout.image_tokens)
    if layout is not None and tokens != layout.image_tokens + layout.text_tokens:
        raise ValueError(f"{tokens} tokens are not those of {layout}")
    if not q.is_cuda:
        return attention_route.attend(q, k, v, cut_sequence(tokens, first, image, density))
    from lowvram_i2v.kernels.attention_launch import card
    from lowvram_i2v.kernels.attention_sparse import attend as attend_sparse

    tile = INT8[card(q.device)][0]
    cut = cut_sequence(tokens, first, image, density, tile.rows, tile.keys)
    return attend_sparse(q, k, v, tile, cut, out)


def dense(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """The backend of dense steps: 8-bit on CUDA, exact on the CPU."""
    if not q.is_cuda:
        return sdpa.attend(q, k, v)
    from lowvram_i2v.attention import triton_int8

    return triton_int8.attend(q, k, v, out)
