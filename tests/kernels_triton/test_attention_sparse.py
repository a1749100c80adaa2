"""Block-sparse attention against its definition, in the interpreter (see `test_attention_interpreted.py`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lowvram_i2v.attention import sparse_trial
from lowvram_i2v.kernels import attention_lists, attention_route
from lowvram_i2v.kernels import attention_reference as reference
from lowvram_i2v.kernels.attention_cut import Cut, cut_sequence
from lowvram_i2v.kernels.attention_int8 import attend_quantized
from lowvram_i2v.kernels.attention_lists import Lists, choose, mean_blocks
from lowvram_i2v.kernels.attention_quantize import (
    SAMPLED,
    TURN,
    Pass,
    Quantized,
    encode_keys,
    encode_values,
    quantize,
    statistics,
)
from lowvram_i2v.kernels.attention_route import Route, block_means
from lowvram_i2v.kernels.attention_sparse import attend, attend_routed, encode_means
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


def unpacked(lists: Lists, cut: Cut) -> Route:
    bits = (lists.skipped[..., None] >> torch.arange(32, device=DEVICE) & 1).flatten(-2).to(torch.uint8)
    assert (bits[..., len(cut.means) :] == 0).all()
    skipped = torch.zeros(*bits.shape[:2], cut.key_blocks, dtype=torch.uint8, device=DEVICE)
    skipped[..., cut.means.start : cut.means.stop] = bits[..., : len(cut.means)]
    return Route(lists.blocks, skipped)


def routed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Cut, tile: Tile = TILE
) -> tuple[torch.Tensor, Route]:
    q_means, v_means, centres = mean_blocks(q, k, v, cut)
    k_means = torch.empty_like(v_means)
    keys = encode_keys(k, tile, centres, means=k_means)
    chosen = choose(q_means, k_means, cut, tile)
    mean_kv = encode_means(k_means, v_means, cut, tile, centres)
    kv = Quantized(*keys, *encode_values(v, tile, centres), len(k))
    return attend_routed(q, kv, mean_kv, chosen, cut, tile), unpacked(chosen, cut)


def dense_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Cut) -> torch.Tensor:
    """With the centres that sparse attention subtracts: those of `statistics` from sums of another order."""
    return attend_quantized(q, quantize(k, v, TILE, mean_blocks(q, k, v, cut)[2]), TILE)


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
    dense = dense_of(q, k, v, cut)
    assert reference.relative_l2(result[4 * 32 :], dense[4 * 32 :]) < 1e-3
    assert reference.relative_l2(result[: 4 * 32], dense[: 4 * 32]) > 1e-3
    plain = attention_route.attend(q.float(), k.float(), v.float(), cut)
    exact = reference.attention(q, k, v)
    assert reference.relative_l2(plain[4 * 32 :], exact[4 * 32 :]) < 1e-5
    assert reference.relative_l2(result, plain) < 0.02


def test_all_blocks_is_dense() -> None:
    q, k, v = inputs()
    cut = replace(cut_of(1.0), text_from=3)  # as many blocks see everything anyway
    assert reference.relative_l2(attend(q, k, v, TILE, cut), dense_of(q, k, v, cut)) < 1e-3


@pytest.mark.parametrize(("count", "kept", "first", "last"), [(17, 17, 0, 1), (100, 20, 3, 4), (65, 13, 0, 5)])
def test_lists_are_those_of_a_sort(count: int, kept: int, first: int, last: int) -> None:
    """Blocks of queries that are longer than those of keys, scores of both signs, in the second head equal ones."""
    generator = torch.Generator().manual_seed(count)
    tokens = 4 * count - 1
    q = torch.randn(tokens, 2, 32, generator=generator).to(DEVICE)
    means = torch.randn(count, 2, 32, generator=generator).to(DEVICE)
    means[:, 1] = 1.0
    cut = Cut(tokens, 32, 4, first, last, 1000, kept)
    by_head = [x.transpose(0, 1).contiguous() for x in (block_means(q, 32), means)]
    made = unpacked(choose(*by_head, cut, Tile(32, 4, 4, 2, "fp16")), cut)
    expected = attention_route.route(q, means, cut)
    assert (made.blocks.diff(dim=-1) > 0).all()
    assert torch.equal(made.blocks[0], expected.blocks[0])
    assert torch.equal(made.skipped[0], expected.skipped[0])
    assert torch.equal(made.skipped.sum(-1), torch.full(made.skipped.shape[:2], count - kept, device=DEVICE))
    must = attention_route.on_every_list(cut, DEVICE)
    assert not (made.skipped.bool() & must).any()


def test_lists_are_whole_whatever_the_scores() -> None:
    """All equal, no numbers, infinite, far apart, tiny, of 50 powers of ten: lists of `kept` places, the highest ones.

    Each row chooses 6 or more freely and leaves some."""
    count, kept = 40, 17
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, count, generator=generator)
    scores[0] = -3.5
    scores[1, 5:30] = float("nan")
    scores[2, 7:9] = float("inf")
    scores[3, 11] = 1e35
    scores[4] *= 1e-42
    scores[5] = 10.0 ** torch.linspace(-25, 25, count)[torch.randperm(count, generator=generator)]
    scores[6, ::2] = -0.0
    scores[7, 10:] = -float("inf")
    q_means, k_means = torch.zeros(8, 5, 32), torch.zeros(8, count, 32)
    q_means[:, :, 0], k_means[:, :, 0] = 1.0, scores
    cut = Cut(4 * count - 1, 32, 4, 2, 1, 1000, kept)
    made = unpacked(choose(q_means.to(DEVICE), k_means.to(DEVICE), cut, Tile(32, 4, 4, 2, "fp16")), cut)
    assert made.blocks.shape == (8, 5, kept)
    assert (made.blocks.diff(dim=-1) > 0).all()
    assert made.blocks.min() >= 0
    assert made.blocks.max() < count
    seen = made.skipped[:, :, :count] == 0
    assert torch.equal(seen.sum(-1), torch.full((8, 5), kept, device=DEVICE))
    assert torch.equal(torch.zeros_like(seen).scatter_(2, made.blocks.long(), value=True), seen)
    must = attention_route.on_every_list(cut, DEVICE)
    assert seen[:, must].all()
    for head in (1, 2, 3, 5, 7):
        ranked = scores[head].nan_to_num(-torch.inf, torch.inf, -torch.inf).to(DEVICE)
        for of, place in zip(seen[head], must, strict=True):
            free = ~place
            assert ranked[of & free].min() >= ranked[~of & free].max()


def test_the_trial_of_lists_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many key blocks as 1280x720, 129 frames have, and few blocks of queries."""
    cut = cut_sequence(119_200, 3600, 118_800, 0.6, 2**15, 64)
    tile, made = Tile(cut.rows, cut.keys, 4, 2, "fp16"), []
    monkeypatch.setattr(attention_lists, "choose", lambda *given: made.append(choose(*given)) or made[-1])
    assert sparse_trial.lists_are_right(cut, tile, 32, DEVICE)
    blocks, skipped = made[0].blocks, made[0].skipped
    for wrong in ((blocks.flip(-1), skipped), (blocks, skipped ^ 1), (blocks + 7, skipped), (blocks * 0, skipped)):
        monkeypatch.setattr(attention_lists, "choose", lambda *_, wrong=wrong: Lists(*wrong))
        assert not sparse_trial.lists_are_right(cut, tile, 32, DEVICE)


@pytest.mark.parametrize(("rows", "keys"), [(32, 32), (64, 16), (16, 64)])
def test_means_are_those_of_plain_torch(rows: int, keys: int) -> None:
    """Views of a wider workspace, a ragged last block, V with offsets."""
    x = torch.cat(inputs(), dim=1)
    q, k, v = x[:, :2], x[:, 2:4], x[:, 4:] + 3
    cut = cut_sequence(TOKENS, 20, TOKENS, 0.2, rows, keys)
    q_means, v_means, (k_centre, v_centre, reach) = mean_blocks(q, k, v, cut)
    for made, given, size in ((q_means, q, rows), (v_means, v, keys)):
        torch.testing.assert_close(made.transpose(0, 1), block_means(given, size), atol=1e-6, rtol=1e-6)
    sampled = k[reference.sampled_tokens(TOKENS, SAMPLED, TURN)]
    torch.testing.assert_close(k_centre, sampled.float().mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v_centre, v.float().mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reach, (v - v_centre).abs().amax(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "keys"), [(TOKENS, 16), (TOKENS, 64), (128, 32), (7, 32)])
def test_means_of_keys_come_with_their_codes(tokens: int, keys: int) -> None:
    """Of K before its centre is subtracted, views of a wider workspace; codes are padded to 64 tokens, means are not,
    and nothing is written behind them. Codes are the same without means, and everything in every run."""
    offsets = 3 * torch.randn(3 * HEADS, DIM, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    wide = torch.cat(inputs(), dim=1)[:tokens] + offsets
    _, k, v = wide.split(HEADS, dim=1)
    tile, blocks = replace(TILE, keys=keys), -(-tokens // keys)
    centres = statistics(k, v)
    plain = encode_keys(k, tile, centres)
    found = []
    for how in (Pass(8, 4, 3), Pass(2, 4, 1)):
        room = torch.full((HEADS * blocks * DIM + 999,), torch.nan, device=DEVICE)
        means = room[: HEADS * blocks * DIM].view(HEADS, blocks, DIM)
        codes = encode_keys(k, tile, centres, how, means)
        assert all(map(torch.equal, codes, plain))
        torch.testing.assert_close(means.transpose(0, 1), block_means(k, keys), atol=1e-5, rtol=1e-6)
        assert room[HEADS * blocks * DIM :].isnan().all()
        found.append(means)
    assert torch.equal(*found)


def test_a_cut_of_another_sequence_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="is not a cut of 165 queries"):
        attend(q, k, v, TILE, cut_of(1.0, rows=64))
