# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The lists of `attention_sparse`, and the means of Q and V, as Triton kernels.

    pass     reads Q and V once: the mean of each block, of V also the lowest and highest values; and one token of K in
             16, for its centre: the means of its blocks come with its codes, for which all of K is read anyway
    centres  what `attention_quantize.statistics` would find by a pass of its own, from the results of this one
    scores   means of queries times means of keys, some heads at a time
    choice   the highest scores of a row: no sort, the lowest of them is found by halving the range of scores

Invariants: token offsets are 64-bit; the lists are those of `attention_route` (which of equal scores is chosen may
differ); sums have one order, so that the same inputs give the same bits; nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_cut import Cut, heads_at_once
from lowvram_i2v.kernels.attention_launch import on_device
from lowvram_i2v.kernels.attention_quantize import SAMPLED, TURN, Centres, padded_length, sampled_count
from lowvram_i2v.kernels.attention_tiles import Tile

LARGEST, TINY = tl.constexpr(3e38), tl.constexpr(1e-30)
"""Scores are kept within the one, those that are no numbers at its negative: infinity is for places on every list. What
is smaller than the other is 0: half of it is a number still."""
STRIP, WIDTH = 128, 16
"""Blocks and channels of one tile of `centres_kernel`."""
SIDE, DEPTH = 64, 32
"""Blocks of queries and of keys of one tile of scores, and channels that it takes at once."""
MEANS_WARPS, PLACES_OF_A_WARP = 2, 1024
"""A row of 1024 scores fits one warp's registers; so nobody waits for others some 20 times."""
PIECE = 32
"""Tokens that `means_kernel` loads at once."""


@dataclass(frozen=True)
class Lists:
    """blocks [heads, query blocks, kept] int32, ascending: which key blocks each query block sees exactly.
    skipped [heads, query blocks, words] int32: bit b of word w is 1 where mean 32 w + b of `Cut.means` is seen."""

    blocks: Tensor
    skipped: Tensor


@triton.jit
def load_rows(x, rows, tokens, stride, DIM: tl.constexpr):
    """Tokens `rows`, zero where there are none, float32."""
    at = x + rows.to(tl.int64)[:, None] * stride + tl.arange(0, DIM)[None, :]
    return tl.load(at, mask=rows[:, None] < tokens, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "query_blocks", "key_blocks"])
def means_kernel(
    q, k, v, q_means, k_sums, v_means, v_low, v_high, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
    v_head_stride, tokens, query_blocks, key_blocks,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, SAMPLED: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """A program takes as many tokens as the longer block has, and loads PIECE of them at once. Of K it adds up the
    tokens of a block that `attention_quantize.statistics_kernel` looks at too."""
    SPAN: tl.constexpr = ROWS if ROWS > KEYS else KEYS
    start = tl.program_id(0) * SPAN
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    q += head * q_head_stride
    k += head * k_head_stride
    v += head * v_head_stride
    for part in tl.static_range(SPAN // ROWS):
        first = start + part * ROWS
        if first < tokens:
            sums = tl.zeros([PIECE, DIM], tl.float32)
            for piece in tl.static_range(0, ROWS, PIECE):
                sums += load_rows(q, first + piece + tl.arange(0, PIECE), tokens, q_stride, DIM)
            at = (head * query_blocks + first // ROWS) * DIM + channels
            tl.store(q_means + at, tl.sum(sums, 0) / tl.minimum(tokens - first, ROWS))
    for part in tl.static_range(SPAN // KEYS):
        first = start + part * KEYS
        if first < tokens:
            count = tl.minimum(tokens - first, KEYS)
            at = (head * key_blocks + first // KEYS) * DIM + channels
            place = first + tl.arange(0, KEYS // SAMPLED) * SAMPLED
            tl.store(k_sums + at, tl.sum(load_rows(k, place + place // TURN % SAMPLED, tokens, k_stride, DIM), 0))
            sums = tl.zeros([PIECE, DIM], tl.float32)
            low = tl.full([PIECE, DIM], float("inf"), tl.float32)
            high = tl.full([PIECE, DIM], -float("inf"), tl.float32)
            for piece in tl.static_range(0, KEYS, PIECE):
                x = load_rows(v, first + piece + tl.arange(0, PIECE), tokens, v_stride, DIM)
                exists = (piece + tl.arange(0, PIECE) < count)[:, None]
                sums += x
                low = tl.minimum(low, tl.where(exists, x, float("inf")))
                high = tl.maximum(high, tl.where(exists, x, -float("inf")))
            tl.store(v_means + at, tl.sum(sums, 0) / count)
            tl.store(v_low + at, tl.min(low, 0))
            tl.store(v_high + at, tl.max(high, 0))


@triton.jit(do_not_specialize=["k_count", "tokens", "blocks"])
def centres_kernel(
    k_sums, v_means, v_low, v_high, k_centre, v_centre, reach, k_count, tokens, blocks,
    KEYS: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows [heads, blocks, DIM] of `means_kernel` -> centres of K and V and the reach of V, WIDTH channels of them."""
    head = tl.program_id(1)
    channels = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    k_sum = tl.zeros([STRIP, WIDTH], tl.float32)
    v_sums = tl.zeros([STRIP, WIDTH], tl.float32)
    low = tl.full([STRIP, WIDTH], float("inf"), tl.float32)
    high = tl.full([STRIP, WIDTH], -float("inf"), tl.float32)
    for start in tl.range(0, blocks, STRIP):
        rows = start + tl.arange(0, STRIP)[:, None]
        counts = tl.minimum(tokens - rows * KEYS, KEYS).to(tl.float32)
        at = (head * blocks + rows) * DIM + channels[None, :]
        exists = rows < blocks
        k_sum += tl.load(k_sums + at, mask=exists, other=0.0)
        v_sums += tl.load(v_means + at, mask=exists, other=0.0) * counts
        low = tl.minimum(low, tl.load(v_low + at, mask=exists, other=float("inf")))
        high = tl.maximum(high, tl.load(v_high + at, mask=exists, other=-float("inf")))
    mean = tl.sum(v_sums, 0) / tokens
    at = head * DIM + channels
    tl.store(k_centre + at, tl.sum(k_sum, 0) / k_count)
    tl.store(v_centre + at, mean)
    tl.store(reach + at, tl.maximum(tl.max(high, 0) - mean, mean - tl.min(low, 0)))


@triton.jit(do_not_specialize=["query_blocks", "key_blocks"])
def scores_kernel(
    q_means, k_means, scores, query_blocks, key_blocks, DIM: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A tile of q_means [heads, query blocks, DIM] times k_means [heads, key blocks, DIM], as exact as float32."""
    head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    places = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    at_q = q_means + (head * query_blocks + rows)[:, None] * DIM + tl.arange(0, DEPTH)[None, :]
    at_k = k_means + (head * key_blocks + places)[:, None] * DIM + tl.arange(0, DEPTH)[None, :]
    of_q, of_k = rows[:, None] < query_blocks, places[:, None] < key_blocks
    score = tl.zeros([SIDE, SIDE], tl.float32)
    for depth in tl.range(0, DIM, DEPTH):
        x = tl.load(at_q + depth, mask=of_q, other=0.0)
        y = tl.load(at_k + depth, mask=of_k, other=0.0)
        score = tl.dot(x, tl.trans(y), score, input_precision="tf32x3")
    at = scores + (head * query_blocks + rows)[:, None] * key_blocks + places[None, :]
    tl.store(at, score, mask=of_q & (places[None, :] < key_blocks))


@triton.jit
def parting_bound(score, low, high, kept):
    """A bound that `kept` scores reach and no other; where equal scores forbid that, the score of the last ones that
    do. low, high: lowest and highest of the scores that are chosen from. The range is halved; all the time

        `kept` scores or more are at least low,
        fewer than `kept` are at least high, or low and high are the bound.
    """
    low = tl.where(tl.sum((score >= high).to(tl.int32), 0) >= kept, high, low)
    middle = low * 0.5 + high * 0.5
    while (low < middle) & (middle < high):
        found = tl.sum((score >= middle).to(tl.int32), 0)
        low = tl.where(found >= kept, middle, low)
        high = tl.where(found > kept, high, middle)
        middle = low * 0.5 + high * 0.5
    return low


@triton.jit(do_not_specialize=["count", "words", "kept", "first", "last", "lower"])
def choice_kernel(
    scores, blocks, skipped, count, words, kept, first, last, lower,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One list: scores [heads, query blocks, count] -> the `kept` places with the highest ones, ascending; of the
    others one bit each. It sees places lower .. count, then those below, all of which are chosen."""
    OWN: tl.constexpr = (ROWS + KEYS - 1) // KEYS
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    exists = tl.arange(0, SIZE) < count
    place = tl.arange(0, SIZE) + lower
    place = tl.where(place < count, place, place - count)
    own = tl.program_id(0) * ROWS // KEYS
    always = (place < first) | (place >= count - last) | ((place >= own) & (place < own + OWN))
    score = tl.load(scores + row * count + place, mask=exists, other=0.0)
    score = tl.where(score == score, tl.minimum(tl.maximum(score, -LARGEST), LARGEST), -LARGEST)
    score = tl.where(tl.abs(score) < TINY, 0.0, score)
    counted = exists & (always == 0)
    low = tl.min(tl.where(counted, score, LARGEST), 0)
    high = tl.max(tl.where(counted, score, -LARGEST), 0)
    score = tl.where(exists, tl.where(always, float("inf"), score), -float("inf"))
    bound = parting_bound(score, low, high, kept)
    above = score > bound
    equal = score == bound
    room = kept - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1 + lower
    at = tl.where(at < kept, at, at - kept)
    tl.store(blocks + row * kept + at, place, mask=chosen)
    bits = tl.reshape((exists & (chosen == 0)).to(tl.int32), [SIZE // 32, 32]) << tl.arange(0, 32)[None, :]
    word = tl.arange(0, SIZE // 32)
    tl.store(skipped + row * words + word, tl.sum(bits, 1), mask=word < words)


def choice_warps(places: int) -> int:
    """Of `choice_kernel`; places is a power of two."""
    return max(1, min(16, places // PLACES_OF_A_WARP))


def mean_blocks(q: Tensor, k: Tensor, v: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Centres]:
    """q, k, v [tokens, heads, dim] -> the means of blocks of Q and of V, [heads, blocks, dim] float32, and the centres
    of K and V with the reach of V."""
    _, heads, dim = k.shape
    q_means = torch.empty(heads, cut.query_blocks, dim, dtype=torch.float32, device=k.device)
    v_means = torch.empty(heads, cut.key_blocks, dim, dtype=torch.float32, device=k.device)
    k_sums, low, high = torch.empty(3, *v_means.shape, dtype=torch.float32, device=k.device).unbind()
    k_centre, v_centre, reach = torch.empty(3, heads, dim, dtype=torch.float32, device=k.device).unbind()
    with on_device(k):
        spans = triton.cdiv(cut.tokens, max(cut.rows, cut.keys))
        means_kernel[(spans, heads)](
            q, k, v, q_means, k_sums, v_means, low, high, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            cut.tokens, cut.query_blocks, cut.key_blocks,
            ROWS=cut.rows, KEYS=cut.keys, DIM=dim, PIECE=min(PIECE, cut.rows, cut.keys), SAMPLED=SAMPLED, TURN=TURN,
            num_warps=MEANS_WARPS,
        )  # fmt: skip
        centres_kernel[(dim // WIDTH, heads)](
            k_sums, v_means, low, high, k_centre, v_centre, reach, sampled_count(cut.tokens), cut.tokens,
            cut.key_blocks,
            KEYS=cut.keys, DIM=dim, STRIP=STRIP, WIDTH=WIDTH,
        )  # fmt: skip
    return q_means, v_means, (k_centre, v_centre, reach)


def choose(q_means: Tensor, k_means: Tensor, cut: Cut, tile: Tile) -> Lists:
    """As `attention_route.route`, given means [heads, blocks, dim] of queries and keys, contiguous; there are as many
    bits as `encode` makes codes of means."""
    heads, _, dim = q_means.shape
    size, padded = (heads, cut.query_blocks), padded_length(len(cut.means), tile)
    blocks = torch.empty(*size, cut.kept, dtype=torch.int32, device=q_means.device)
    skipped = torch.empty(*size, padded // 32, dtype=torch.int32, device=q_means.device)
    places = triton.next_power_of_2(max(padded, cut.key_blocks))
    step = heads_at_once(cut, heads)
    for first in range(0, heads, step):
        some = slice(first, first + step)
        count = min(step, heads - first)
        scores = torch.empty(count, cut.query_blocks, cut.key_blocks, dtype=torch.float32, device=q_means.device)
        with on_device(scores):
            scores_kernel[(triton.cdiv(cut.key_blocks, SIDE), triton.cdiv(cut.query_blocks, SIDE), count)](
                q_means[some], k_means[some], scores, cut.query_blocks, cut.key_blocks,
                DIM=dim, SIDE=SIDE, DEPTH=DEPTH,
            )  # fmt: skip
            choice_kernel[(cut.query_blocks, count)](
                scores, blocks[some], skipped[some], cut.key_blocks, skipped.shape[2], cut.kept, cut.first, cut.last,
                cut.means.start, ROWS=cut.rows, KEYS=cut.keys, SIZE=places, num_warps=choice_warps(places),
            )  # fmt: skip
        del scores  # before the next are made
    return Lists(blocks, skipped)
