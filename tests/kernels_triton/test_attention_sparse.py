"""Block-sparse attention against its definition, in the interpreter (see `test_attention_interpreted.py`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lowvram_i2v.kernels import attention_reference as reference
from lowvram_i2v.kernels import attention_route
from lowvram_i2v.kernels.attention_cut import Cut, cut_sequence
from lowvram_i2v.kernels.attention_int8 import attend_quantized
from lowvram_i2v.kernels.attention_quantize import encode, quantize, statistics
from lowvram_i2v.kernels.attention_route import Route, block_means
from lowvram_i2v.kernels.attention_sparse import attend, attend_routed, route
from lowvram_i2v.kernels.attention_tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = Tile(32, 32, 4, 2, "fp16")
TOKENS, HEADS, DIM = 32 * 5 + 5, 2, 64
TEXT = 7


def cut_of(density: float, rows: int = 32) -> Cut:
    """The text starts in block 4 of 6."""
    return cut_sequence(TOKENS, 20, TOKENS - TEXT, density, rows, 32)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of 32 tokens with directions of their own, as bricks of a video have."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(3, 6, 1, HEADS, DIM, generator=generator).expand(3, 6, 32, HEADS, DIM)
    x = own.reshape(3, 192, HEADS, DIM)[:, :TOKENS] + 0.5 * torch.randn(3, TOKENS, HEADS, DIM, generator=generator)
    return x.half().to(DEVICE).unbind()


def routed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Cut, tile: Tile = TILE
) -> tuple[torch.Tensor, Route]:
    centres = statistics(k, v)
    means = block_means(k, 32)
    chosen = route(q, means - centres[0], cut, tile)
    kv, mean_kv = quantize(k, v, tile, centres), encode(means, block_means(v, 32), tile, centres)
    return attend_routed(q, kv, mean_kv, chosen, cut, tile), chosen


def test_lists_and_means_give_the_definition() -> None:
    q, k, v = inputs()
    cut = replace(cut_of(0.0), text_from=6)  # no block sees everything: text as the others
    tile = replace(TILE, pv="fp8")
    result, chosen = routed(q, k, v, cut, tile)
    assert chosen.blocks.shape == (HEADS, 6, 4)
    assert torch.equal(chosen.skipped.sum(-1), torch.full((HEADS, 6), 2, device=DEVICE))
    expected = reference.sparse_attention(q, k, v, chosen.blocks, 32, 32)
    assert reference.relative_l2(result, expected) < 0.05
    plain = attention_route.attend_listed(q.float(), k.float(), v.float(), chosen, cut)
    assert reference.relative_l2(plain, expected) < 1e-5
    assert torch.equal(attend(q, k, v, tile, cut, out=q), result)


def test_text_sees_everything_exactly() -> None:
    q, k, v = inputs()
    cut = cut_of(0.0)
    assert (cut.first, cut.last, cut.text_from, cut.kept) == (1, 2, 4, 4)
    result, _ = routed(q, k, v, cut)
    dense = attend_quantized(q, quantize(k, v, TILE), TILE)
    assert reference.relative_l2(result[4 * 32 :], dense[4 * 32 :]) < 1e-3
    assert reference.relative_l2(result[: 4 * 32], dense[: 4 * 32]) > 1e-3
    plain = attention_route.attend(q.float(), k.float(), v.float(), cut)
    exact = reference.attention(q, k, v)
    assert reference.relative_l2(plain[4 * 32 :], exact[4 * 32 :]) < 1e-5
    assert reference.relative_l2(result, plain) < 0.02


def test_all_blocks_is_dense() -> None:
    q, k, v = inputs()
    expected = attend_quantized(q, quantize(k, v, TILE), TILE)
    assert reference.relative_l2(attend(q, k, v, TILE, cut_of(1.0)), expected) < 1e-3


@pytest.mark.parametrize(("count", "kept", "first", "last"), [(17, 17, 0, 1), (100, 20, 3, 4), (65, 13, 0, 5)])
def test_lists_are_those_of_a_sort(count: int, kept: int, first: int, last: int) -> None:
    """Blocks of queries that are longer than those of keys, scores of both signs, in the second head equal ones."""
    generator = torch.Generator().manual_seed(count)
    tokens = 4 * count - 1
    q = torch.randn(tokens, 2, 32, generator=generator).to(DEVICE)
    means = torch.randn(count, 2, 32, generator=generator).to(DEVICE)
    means[:, 1] = 1.0
    cut = Cut(tokens, 32, 4, first, last, 1000, kept)
    made, expected = route(q, means, cut, Tile(32, 4, 4, 2, "fp16")), attention_route.route(q, means, cut)
    assert (made.blocks.diff(dim=-1) > 0).all()
    assert torch.equal(made.blocks[0], expected.blocks[0])
    assert torch.equal(made.skipped[0, :, :count], expected.skipped[0])
    assert (made.skipped[..., count:] == 0).all()
    assert torch.equal(made.skipped.sum(-1), torch.full(made.skipped.shape[:2], count - kept, device=DEVICE))
    must = attention_route.on_every_list(cut, DEVICE)
    assert not (made.skipped[..., :count].bool() & must).any()


def test_a_cut_of_another_sequence_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="is not a cut of 165 queries"):
        attend(q, k, v, TILE, cut_of(1.0, rows=64))
