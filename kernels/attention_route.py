"""Block-sparse attention as plain torch: which key blocks matter to a block of queries, and attention over such lists.

A block of queries scores key blocks by the product of both mean vectors and sees the best ones exactly. A block that is
not on its list is not dropped: its mean key, with the logarithm of its length added to the score, and its mean value
stand for it, so no part of a row's sum is lost. `attention_cut` says which blocks are on every list.

This is what `attention_sparse` computes, in the inputs' own precision and in as many operations as dense attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram_i2v.kernels.attention_cut import Cut


@dataclass(frozen=True)
class Route:
    """blocks [heads, query blocks, kept] int32, ascending: which key blocks each query block sees exactly.
    skipped [heads, query blocks, key blocks or more] uint8: 1 where a block's mean stands for it."""

    blocks: Tensor
    skipped: Tensor


def block_means(x: Tensor, size: int) -> Tensor:
    """x [tokens, heads, dim] -> means of blocks of `size` tokens, [blocks, heads, dim] float32."""
    whole = len(x) // size
    means = torch.empty(-(-len(x) // size), *x.shape[1:], dtype=torch.float32, device=x.device)
    blocks = x[: whole * size].reshape(whole, size, *x.shape[1:])
    torch.mean(blocks, 1, dtype=torch.float32, out=means[:whole])
    if whole < len(means):
        torch.mean(x[whole * size :], 0, dtype=torch.float32, out=means[whole])
    return means


def on_every_list(cut: Cut, device: torch.device) -> Tensor:
    """[query blocks, key blocks] bool: first frame, text, the query block's own keys."""
    block = torch.arange(cut.key_blocks, device=device)
    own = torch.arange(cut.query_blocks, device=device)[:, None] * cut.rows // cut.keys
    return (block < cut.first) | (block >= cut.key_blocks - cut.last) | ((block >= own) & (block < own + cut.own))


def route(q: Tensor, key_means: Tensor, cut: Cut) -> Route:
    """The lists for q [tokens, heads, dim], given the means of key blocks [blocks, heads, dim]."""
    scores = torch.einsum("qhd,khd->hqk", block_means(q, cut.rows), key_means)
    scores.masked_fill_(on_every_list(cut, q.device), float("inf"))
    blocks = scores.topk(cut.kept, dim=-1).indices.sort(-1).values
    skipped = torch.ones(scores.shape, dtype=torch.uint8, device=q.device)
    return Route(blocks.int(), skipped.scatter_(2, blocks, 0))


def attend_listed(q: Tensor, k: Tensor, v: Tensor, chosen: Route, cut: Cut) -> Tensor:
    """Attention of q, k, v [tokens, heads, dim] over lists, a block of queries at a time -> the same shape."""
    lengths = torch.full((cut.key_blocks,), float(cut.keys), device=q.device)
    lengths[-1] = cut.tokens - (cut.key_blocks - 1) * cut.keys
    keys, values = (torch.cat([x, block_means(x, cut.keys).to(x.dtype)]).transpose(0, 1) for x in (k, v))
    never = torch.tensor(-math.inf, device=q.device)
    result = []
    for place, rows in enumerate(torch.split(q.transpose(0, 1) * q.shape[2] ** -0.5, cut.rows, dim=1)):
        skipped = chosen.skipped[:, place, : cut.key_blocks] * (place < cut.text_from)
        exact = torch.where(skipped == 0, 0.0, never).repeat_interleave(cut.keys, 1)[:, : cut.tokens]
        means = torch.where(skipped == 0, never, lengths.log())
        bias = torch.cat([exact, means], dim=1)[:, None]
        result.append(torch.softmax(rows @ keys.transpose(1, 2) + bias, -1).to(q.dtype) @ values)
    return torch.cat(result, dim=1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, cut: Cut) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim]: what `attention_sparse.attend` approximates in 8 bits."""
    return attend_listed(q, k, v, route(q, block_means(k, cut.keys), cut), cut)
