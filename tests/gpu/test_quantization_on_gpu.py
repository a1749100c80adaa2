"""The codes of keys and values on this card, byte for byte: compilers have made wrong ones of right kernels.

Buffers and shared memory are full of NaN before each call, so that what was never written shows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowvram_i2v.kernels import attention_reference as reference
from lowvram_i2v.kernels.attention_launch import card
from lowvram_i2v.kernels.attention_quantize import SAMPLED, TURN, Quantized, quantize, statistics
from lowvram_i2v.kernels.attention_tiles import INT8, Tile

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HEADS, DIM = 24, 128
PV = list(dict.fromkeys(tile.pv for tiles in INT8.values() for tile in tiles))


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """K and V in bf16, views of one projection's output, with offsets."""
    generator = torch.Generator(CUDA).manual_seed(tokens)
    both = torch.randn(tokens, 2, HEADS, DIM, device=CUDA, generator=generator)
    return tuple((both + torch.randn(2, HEADS, DIM, device=CUDA, generator=generator)).bfloat16().unbind(1))


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    empty = torch.empty

    def full_of_nan(*shape: object, **options: object) -> Tensor:
        made: Tensor = empty(*shape, **options)  # type: ignore[call-overload]
        made.view(torch.uint8).fill_(255)
        return made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    ones = torch.full((4096, 4096), -1, dtype=torch.int16, device=CUDA).view(torch.bfloat16)
    return lambda: ones @ ones


def tile_of(pv: str) -> Tile:
    tiles = [tile for tile in INT8[card(CUDA)] if tile.pv == pv]
    if not tiles:
        pytest.skip(f"no tile of this card takes V as {pv}")
    return tiles[0]


def parts(kv: Quantized) -> list[Tensor]:
    return [x.view(torch.uint8) for x in (kv.k, kv.k_scale, kv.v, kv.v_scale, kv.v_centre)]


@pytest.mark.parametrize("tokens", [601, 8192, 34192])
@pytest.mark.parametrize("pv", PV)
def test_codes_are_those_of_the_definition(pv: str, tokens: int, dirty: Callable[[], object]) -> None:
    tile, (k, v) = tile_of(pv), inputs(tokens)
    centres = statistics(k, v)
    sampled = reference.sampled_tokens(tokens, SAMPLED, TURN).to(CUDA)
    for got, want in zip(
        centres, (k[sampled].float().mean(0), v.float().mean(0), (v.float() - centres[1]).abs().amax(0)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    made = []
    for _ in range(3):
        dirty()
        made.append(quantize(k, v, tile))
    for again in made[1:]:
        assert all(torch.equal(x, y) for x, y in zip(parts(made[0]), parts(again), strict=True))
    kv, eight = made[0], pv.startswith("fp8")
    codes, scales = reference.quantize_keys(k, centres[0], tile.keys)
    apart = (kv.k[:, : codes.shape[1]].int() - codes).abs()
    assert apart.max() < 2
    assert apart.float().mean() < 1e-3
    assert not kv.k[:, tokens:].any()
    torch.testing.assert_close(kv.k_scale[:, : scales.shape[1]], scales, rtol=1e-4, atol=0.0)
    values = reference.quantize_values(v, centres[1], kv.v_scale, kv.v.shape[2 if eight else 1], eight).float()
    apart = (kv.v.float() - values).abs()
    assert (apart <= values.abs() / (8 if eight else 1024) + (2**-9 if eight else 1e-6)).all()
    assert (apart > 0).float().mean() < (1e-3 if eight else 0.05)
    shifted = centres[1] - kv.v.float().sum(2 if eight else 1) / tokens * kv.v_scale
    torch.testing.assert_close(kv.v_centre, shifted, rtol=1e-4, atol=1e-4)
