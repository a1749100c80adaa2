"""Attention of one head of 512 channels: a frame's queries against all keys so far.

Fused kernels end at 256 channels, but for torch's memory-efficient one, which reaches a tenth of the matrix products'
rate there. Two products with a softmax step between them, some keys at a time, are faster (`by_products`): scores and
sums in float32, weights in the storage dtype, as in a fused kernel. They need products of 16-bit
matrices into float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.kernels.group_norm import has_triton, wide
from lowvram_i2v.kernels.softmax_step import softmax_step
from lowvram_i2v.vae.layout import KEYS, AttentionLayout, attention_layout
from lowvram_i2v.vae.route import Shape
from lowvram_i2v.vae.streamed import Attend, Room

TOLERANCE = 1e-2  # of 16-bit results


def fused(q: Tensor, k: Tensor, v: Tensor, room: Room, at: AttentionLayout) -> Tensor:
    """torch's own choice: q [M, C], k and v [N, C] -> [M, C]."""
    out = room.at(at.tokens, q.shape)
    return out.copy_(F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0])


def by_products(q: Tensor, k: Tensor, v: Tensor, room: Room, at: AttentionLayout) -> Tensor:
    """The same."""
    (queries, channels), dtype = q.shape, wide(q.dtype)
    total = room.at(at.total, q.shape, dtype).zero_()
    highest, sums = room.at(at.rows, (2, queries), dtype)
    highest.fill_(-torch.inf)
    sums.zero_()
    for first in range(0, len(k), KEYS):
        some, values = k[first : first + KEYS], v[first : first + KEYS]
        scores = room.at(at.scores, (queries, len(some)), dtype)
        weights = room.at(at.weights, (queries, len(some)))
        product_into(scores, q, some.t(), add=False)
        softmax_step(scores, channels**-0.5, weights, total, highest, sums)
        product_into(total, weights, values, add=True)
    total /= sums[:, None]
    return room.at(at.tokens, q.shape).copy_(total)


def product_into(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or += ; out may be wider than a and b."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def trusted_attention(device: torch.device, dtype: torch.dtype) -> Attend:
    """`by_products` where this torch has its product and it agrees with `fused`, which else does it."""
    has_product = hasattr(torch.ops.aten.addmm, "dtype_out") and hasattr(torch.ops.aten.mm, "dtype_out")
    if dtype == torch.float32 or not has_product or not has_triton(torch.empty(0, device=device)):
        return fused
    shape, channels = Shape(2, 36, 40), 512
    at = attention_layout(shape, channels, dtype.itemsize, on_host=False)
    room = Room(torch.empty(at.size, dtype=torch.uint8, device=device), dtype)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(n, channels, generator=generator, device=device).to(dtype) for n in (1440, 2880, 2880))
    expected = fused(q, k, v, room, at).float()
    try:
        found = by_products(q, k, v, room, at).float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a torch that names the product, and has it for other devices only, or not for these types
        return fused
    return by_products if bool((found - expected).norm() < TOLERANCE * expected.norm()) else fused
