"""Block-sparse attention in the model: what is exact stays exact, dense steps are dense, better blocks are better."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_inputs import Inputs, random_inputs
from torch import Tensor

from lowvram_i2v import attention
from lowvram_i2v.attention import Layout, by_layout, sdpa, triton_sparse
from lowvram_i2v.attention.memory import extra_bytes
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.token_order import token_order
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.dit.workspace import Chunking, Workspace
from lowvram_i2v.kernels import attention_route
from lowvram_i2v.kernels.attention_cut import cut_sequence
from lowvram_i2v.kernels.attention_reference import relative_l2, sparse_attention
from lowvram_i2v.kernels.attention_route import block_means
from lowvram_i2v.sampling.denoise import GuidedVelocity

CPU = torch.device("cpu")
GRID, TEXT = (5, 6, 10), 9
SMALL = {"hidden_size": 256, "heads": 2, "double_blocks": 1, "single_blocks": 1, "text_dim": 20, "pooled_dim": 12}


@cache
def model_and_inputs(concat: bool) -> tuple[HunyuanVideoTransformer, Inputs]:
    torch.manual_seed(0)
    channels = {"in_channels": 33, "guidance_embed": False} if concat else {}
    model = HunyuanVideoTransformer(TransformerConfig(**SMALL, **channels)).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    size = {"size": (16 * GRID[2], 16 * GRID[1]), "frames": 4 * GRID[0] - 3, "text_tokens": TEXT, "steps": 5}
    return model, random_inputs(model.config, **size, device=CPU, dtype=torch.float32)


def velocity(
    concat: bool, density: float, after: float, *, ordered: bool = True, chunked: bool = True
) -> GuidedVelocity:
    model, inputs = model_and_inputs(concat)
    order = token_order(GRID, model.config.patch_size) if ordered else None
    tokens = GRID[0] * GRID[1] * GRID[2]
    work = Workspace(model.config, tokens, TEXT, Chunking(100, 1), CPU, torch.float32) if chunked else None
    return GuidedVelocity(
        model,
        inputs.steps,
        None,
        1.0,
        order.rope(inputs.rope) if order else inputs.rope,
        work=work,
        attention=by_layout("triton-sparse", density, after),
        order=order,
    )


def dense(concat: bool, step: int) -> Tensor:
    model, inputs = model_and_inputs(concat)
    return model.predict(inputs.latents, inputs.steps[step], inputs.rope)


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_all_blocks_in_any_order_is_dense(concat: bool, chunked: bool) -> None:
    latents = model_and_inputs(concat)[1].latents
    exact = dense(concat, 3)
    for ordered in (False, True):
        found = velocity(concat, 1.0, 0.0, ordered=ordered, chunked=chunked)(latents, 3)
        assert relative_l2(found, exact) < 1e-5


def test_order_changes_nothing_for_other_backends() -> None:
    made = replace(velocity(False, 1.0, 0.0), attention=by_layout("sdpa", 0.2, 0.0))
    assert made.attention is None
    assert relative_l2(made(model_and_inputs(False)[1].latents, 0), dense(False, 0)) < 1e-5


def test_first_steps_are_dense() -> None:
    sparse, latents = velocity(False, 0.1, 0.3), model_and_inputs(False)[1].latents
    errors = [relative_l2(sparse(latents, step), dense(False, step)) for step in (1, 2)]
    assert errors[0] < 5e-6  # 0.3 * 5 steps are 1.5, and so 2
    assert errors[1] > 2e-5


def test_both_prompts_have_their_own_layout() -> None:
    """With guidance the negative prompt may be of another length."""
    model, inputs = model_and_inputs(False)
    seen: list[Layout] = []

    def watched(layout: Layout) -> attention.AttentionBackend:
        seen.append(layout)
        return sdpa.attend

    shorter = [replace(step, txt=step.txt[:4]) for step in inputs.steps]
    GuidedVelocity(model, inputs.steps, shorter, 2.0, inputs.rope, attention=watched)(inputs.latents, 1)
    assert seen == [Layout(60, 300, text, 1, 5) for text in (TEXT, 4)]


def test_a_sequence_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="20 tokens are not those of"):
        triton_sparse.attend(*torch.randn(3, 20, 1, 8).unbind(), layout=Layout(2, 10, 9, 0, 1))


def test_without_a_layout_it_is_exact() -> None:
    q, k, v = torch.randn(3, 333, 2, 16).unbind()
    assert relative_l2(attention.get("triton-sparse")(q, k, v), sdpa.attend(q, k, v)) < 1e-5


@given(
    st.integers(1, 6), st.integers(1, 200), st.integers(0, 150), st.floats(0, 1), st.sampled_from([(64, 32), (32, 32)])
)
def test_text_and_first_frame_are_on_every_list(
    frames: int, first: int, text: int, density: float, tile: tuple[int, int]
) -> None:
    tokens, (rows, keys) = frames * first + text, tile
    cut = cut_sequence(tokens, first, frames * first, density, rows, keys)
    q, k = torch.randn(2, tokens, 2, 8).unbind()
    chosen = attention_route.route(q, block_means(k, keys), cut)
    assert chosen.blocks.shape == (2, -(-tokens // rows), cut.kept)
    exact = (chosen.skipped == 0).repeat_interleave(keys, -1)[..., :tokens]
    assert exact[..., :first].all()
    assert exact[..., frames * first :].all()
    assert exact[..., -1].all()  # the block that may be ragged
    for block in range(cut.query_blocks):
        assert exact[:, block, block * rows : (block + 1) * rows].all()
    assert cut.kept >= min(cut.key_blocks, round(density * cut.key_blocks))
    assert cut.text_from * rows <= frames * first or not text


def structured(tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k that turn slowly along the sequence, as neighbours in a video do, so that few blocks matter."""
    generator = torch.Generator().manual_seed(5)
    angle = torch.linspace(0, 12, tokens)[:, None, None] * torch.rand(heads, dim // 2, generator=generator)
    slow = torch.cat([angle.cos(), angle.sin()], -1)
    noise = torch.randn(3, tokens, heads, dim, generator=generator)
    return 3 * slow + 0.3 * noise[0], 3 * slow + 0.3 * noise[1], slow + 0.5 * noise[2]


def test_chosen_blocks_are_better_than_random_ones() -> None:
    q, k, v = structured(700, 2, 32)
    exact = sdpa.attend(q, k, v)
    errors = []
    for density in (0.25, 0.5):
        cut = cut_sequence(700, 32, 700, density, 64, 32)
        errors.append(relative_l2(attention_route.attend(q, k, v, cut), exact))
        scores = torch.rand(2, cut.query_blocks, cut.key_blocks, generator=torch.Generator().manual_seed(1))
        scores.masked_fill_(attention_route.on_every_list(cut, CPU), 2.0)
        blocks = scores.topk(cut.kept, -1).indices.sort(-1).values
        skipped = torch.ones_like(scores, dtype=torch.uint8).scatter_(2, blocks, 0)
        chosen = attention_route.Route(blocks.int(), skipped)
        assert errors[-1] < relative_l2(attention_route.attend_listed(q, k, v, chosen, cut), exact) / 2
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.1


def test_plain_torch_is_the_definition() -> None:
    q, k, v = structured(333, 2, 16)
    cut = replace(cut_sequence(333, 20, 333, 0.3, 64, 32), text_from=99)
    chosen = attention_route.route(q, block_means(k, 32), cut)
    expected = sparse_attention(q, k, v, chosen.blocks, 64, 32)
    assert relative_l2(attention_route.attend(q, k, v, cut), expected) < 1e-5


def test_extra_bytes_grow_as_the_work_does() -> None:
    sizes = partial(extra_bytes, first_tokens=3600, image_tokens=118_800, text_tokens=400, heads=24, dim=128)
    codes = 2 * 24 * 119_232 * 128
    assert codes < sizes("triton-int8") < 1.001 * codes
    assert sizes("triton-int8") < sizes("triton-sparse", density=0.2) < 1.15 * codes
    assert 1.5 * codes < sizes("triton-int8", value=2) < 1.501 * codes
    assert sizes("triton") == 0
    assert set(attention.BACKENDS) == {name for name in attention.BACKENDS if sizes(name) >= 0}
    assert sizes(attention.AUTO) == max(sizes("sdpa"), sizes("triton-int8"))
    with pytest.raises(ValueError, match="'magic' is not one of sdpa"):
        sizes("magic")
