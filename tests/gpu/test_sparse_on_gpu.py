"""Block-sparse attention on this card: against its definition, in its memory, without waiting for the device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowvram_i2v import attention
from lowvram_i2v.attention import Layout, by_layout, sparse_trial, triton_int8, triton_sparse
from lowvram_i2v.attention.memory import extra_bytes
from lowvram_i2v.kernels import attention_route
from lowvram_i2v.kernels.attention_cut import cut_sequence
from lowvram_i2v.kernels.attention_launch import card
from lowvram_i2v.kernels.attention_reference import relative_l2
from lowvram_i2v.kernels.attention_tiles import INT8

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
MIB = 2**20


def alike(tokens: int, heads: int, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 q, k, v that turn slowly along the sequence; views of a workspace with more heads."""
    generator = torch.Generator(CUDA).manual_seed(1)
    rate = torch.rand(heads + 2, dim // 2, device=CUDA, generator=generator)
    angle = torch.linspace(0, tokens / 300, tokens, device=CUDA)[:, None, None] * rate
    slow = torch.cat([angle.cos(), angle.sin()], -1)
    noise = torch.randn(3, tokens, heads + 2, dim, device=CUDA, generator=generator)
    return tuple(x.bfloat16()[:, 1:-1] for x in (slow + 0.3 * noise[0], slow + 0.3 * noise[1], slow + 0.5 * noise[2]))


@pytest.mark.parametrize(("first", "frames", "text"), [(60, 9, 19), (256, 8, 0), (333, 21, 401), (1, 1, 0), (70, 1, 1)])
def test_it_is_the_definition(first: int, frames: int, text: int) -> None:
    image = first * frames
    q, k, v = alike(image + text, 2)
    layout = Layout(first, image, text, 3, 10)
    tile = INT8[card(CUDA)][0]
    cut = cut_sequence(image + text, first, image, 0.3, tile.rows, tile.keys)
    expected = attention_route.attend(q.float(), k.float(), v.float(), cut)
    found = by_layout("triton-sparse", 0.3, 0.2)(layout)(q, k, v)  # type: ignore[misc]
    assert relative_l2(found, expected) < 0.06
    assert triton_sparse.attend(q, k, v, q, layout=layout, density=0.3) is q
    assert torch.equal(q, found)


def test_without_a_layout_and_in_dense_steps_it_is_dense() -> None:
    q, k, v = alike(3001, 3)
    dense = triton_int8.attend(q, k, v)
    assert relative_l2(attention.get("triton-sparse")(q, k, v), dense) < 0.03
    first = by_layout("triton-sparse", 0.1, 0.2)(Layout(300, 2900, 101, 1, 10))  # type: ignore[misc]
    assert torch.equal(first(q, k, v), dense)


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 33, 65])
def test_lists_are_those_of_a_sort(frames: int) -> None:
    """At every length of a row of scores up to that of 257 frames of 1280x720; 33 latent frames have 119 200 tokens."""
    layout = Layout(3600, 3600 * frames, 400, 0, 1)
    assert sparse_trial.lists_fault(layout, 0.2, CUDA, 128) is None


def test_nothing_waits_for_the_device() -> None:
    q, k, v = alike(5000, 2)
    sparse = by_layout("triton-sparse", 0.3, 0.0)(Layout(400, 4800, 200, 0, 2))  # type: ignore[misc]
    sparse(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["triton-int8", "triton-sparse"])
def test_it_allocates_what_is_stated(name: str) -> None:
    layout, heads = Layout(1024, 33 * 1024, 300, 0, 2), 8
    q, k, v = alike(layout.image_tokens + layout.text_tokens, heads)
    chosen = by_layout(name, 0.2, 0.0)
    attend = attention.get(name) if chosen is None else chosen(layout)
    attend(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(q, k, v)
    took = torch.cuda.max_memory_allocated() - before - out.nbytes
    value = 2 if card(CUDA) == "sm_86" else 1
    stated = extra_bytes(
        name, layout.first_tokens, layout.image_tokens, layout.text_tokens, heads, 128, density=0.2, value=value
    )
    assert 0.95 * stated < took < 1.02 * stated + 2 * MIB
