"""The plan of the denoising phase against the allocations of the code that runs in it, at full size, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest

pytest.importorskip("triton")

import torch
from pretend_gpu import META, Allocator, Followed, silent_kernels
from step_inputs import Inputs, random_inputs
from torch import Tensor

from lowvram_i2v.attention import Layout
from lowvram_i2v.checkpoint import ModelFolder
from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.token_order import token_order
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.dit.workspace import Workspace
from lowvram_i2v.kernels.attention_cut import cut_sequence, heads_at_once
from lowvram_i2v.kernels.attention_int8 import attend_quantized
from lowvram_i2v.kernels.attention_lists import choose
from lowvram_i2v.kernels.attention_quantize import quantize
from lowvram_i2v.kernels.attention_sparse import attend as attend_sparse
from lowvram_i2v.kernels.attention_tiles import INT8
from lowvram_i2v.kernels.ops import fused
from lowvram_i2v.kernels.quant_linear import set_compute
from lowvram_i2v.plan import Machine, MemoryPlan, Video, make_plan, tokens
from lowvram_i2v.profile import VramProfile, load_profile
from lowvram_i2v.sampling.conditioning import condition
from lowvram_i2v.sampling.denoise import GuidedVelocity, denoise
from lowvram_i2v.sizes import ELEMENT, ModelSizes, sizes_of
from lowvram_i2v.streaming.block_stream import streamed_places
from lowvram_i2v.synth.headers import model_headers
from lowvram_i2v.variant import VARIANTS

CUBLAS = 32 * 2**20
"""Bytes that the matrix library takes from the allocator on an H100."""
BLOCKS, STEPS = 1, 2
"""Of each kind, and steps, of which the first is dense."""


@cache
def released() -> tuple[ModelFolder, ModelSizes]:
    model = model_headers("full", VARIANTS["token_replace"], "int8")
    return model, sizes_of(model)


def attend_in_8_bits(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, *, card: str) -> Tensor:
    """As `triton_int8.attend`."""
    tile = INT8[card][0]
    return attend_quantized(q, quantize(k, v, tile), tile, out)


def attend_where_it_matters(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, *, card: str, layout: Layout, density: float
) -> Tensor:
    """As `triton_sparse.attend`."""
    tile = INT8[card][0]
    cut = cut_sequence(len(k), layout.first_tokens, layout.image_tokens, density, tile.rows, tile.keys)
    return attend_sparse(q, k, v, tile, cut, out)


def by_layout(layout: Layout, *, dense: Callable[..., Tensor], card: str, density: float) -> Callable[..., Tensor]:
    """As `triton_sparse.Sparse`."""
    return partial(attend_where_it_matters, card=card, layout=layout, density=density) if layout.step else dense


def opened(profile: VramProfile, allocator: Allocator, plan: MemoryPlan) -> HunyuanVideoTransformer:
    """The transformer with few blocks on the meta device, after its own weights, resident blocks and slots."""
    model, sizes = released()
    transformer = model.build("transformer", lambda: HunyuanVideoTransformer(sizes.transformer))
    set_compute(transformer, profile.compute)
    for name, weight in transformer.named_parameters():
        weight.data = weight.data.to(torch.bfloat16)
        if not is_conditioning(name) and not is_in_block(name):
            allocator.take(ELEMENT * weight.numel())
    places = streamed_places(plan.blocks, plan.resident, profile.slots)
    for place, size in enumerate(sizes.slabs):
        if place not in places:
            allocator.take(size)
    for _ in range(plan.slots):
        allocator.take(max(sizes.slabs[place] for place in places))
    transformer.double_blocks = transformer.double_blocks[:BLOCKS]
    transformer.single_blocks = transformer.single_blocks[:BLOCKS]
    return transformer


@cache
def inputs_of(video: Video) -> Inputs:
    _, sizes = released()
    made = random_inputs(
        sizes.transformer,
        size=(video.width, video.height),
        frames=video.frames,
        steps=STEPS,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        text_tokens=tokens(sizes, video)[1],
    )
    return replace(made, steps=[replace(step, double_blocks=BLOCKS, single_blocks=BLOCKS) for step in made.steps])


@torch.inference_mode()
def run(profile: VramProfile, video: Video, plan: MemoryPlan, card: str) -> Allocator:
    """As `pipeline.sample`."""
    _, sizes = released()
    config, inputs, allocator = sizes.transformer, inputs_of(video), Allocator()
    transformer = opened(profile, allocator, plan)
    allocator.take(CUBLAS)
    _, time, height, width = inputs.latents.shape
    attend = partial(attend_in_8_bits, card=card)
    chosen, order = None, None
    transformer.attend = attend
    with Followed(allocator), silent_kernels():
        if profile.attention == "triton-sparse":
            chosen = partial(by_layout, dense=attend, card=card, density=profile.sparse_density)
            order = token_order((time, height // 2, width // 2), config.patch_size).to(META)
        cos, sin = (table.to(META) for table in inputs.rope)
        work = Workspace(config, *tokens(sizes, video), plan.chunking, META, torch.bfloat16, fused())
        blocks = [*transformer.double_blocks, *transformer.single_blocks]
        velocity = GuidedVelocity(transformer, inputs.steps, None, 1.0, (cos, sin), blocks, work, chosen, order)
        first = torch.empty(config.out_channels, 1, height, width, device=META)
        sigmas = torch.linspace(1, 0, STEPS + 1)
        denoise(velocity, condition(sizes.variant, first), inputs.latents.to(META), sigmas, lambda step, latents: None)
    return allocator


@pytest.mark.parametrize(
    ("name", "size", "frames", "card"),
    [
        ("6gb-fast", (1280, 720), 129, "sm_90"),
        ("6gb-sparse", (1280, 720), 129, "sm_90"),
        ("8gb-sparse", (512, 512), 129, "sm_86"),
        ("8gb-fast", (640, 368), 65, "sm_86"),
    ],
)
def test_what_the_allocator_reserves_is_what_was_planned(
    name: str, size: tuple[int, int], frames: int, card: str
) -> None:
    profile, video = load_profile(name), Video(*size, frames)
    plan = make_plan(released()[1], video, profile, Machine(None, None, float8=card != "sm_86"))
    allocator = run(profile, video, plan, card)
    off = plan.vram("denoise") / allocator.most_reserved - 1
    assert -0.005 < off < 0.015, f"{off:+.2%}"
    assert allocator.most_allocated < plan.vram("denoise")


def test_only_one_group_of_heads_has_scores_at_a_time() -> None:
    heads, cut, allocator = 24, cut_sequence(119_200, 3600, 118_800, 0.2), Allocator()
    means = [torch.empty(heads, blocks, 128, device=META) for blocks in (cut.query_blocks, cut.key_blocks)]
    with Followed(allocator), silent_kernels():
        lists = choose(*means, cut, INT8["sm_90"][0])
    scores = 4 * heads_at_once(cut, heads) * cut.query_blocks * cut.key_blocks
    assert heads_at_once(cut, heads) < heads
    assert allocator.most_allocated < 1.01 * (lists.blocks.nbytes + lists.skipped.nbytes + scores)


def test_pages_are_reserved_whole_and_freed_blocks_are_used_again() -> None:
    allocator, mib = Allocator(), 2**20
    first, second = allocator.take(15 * mib), allocator.take(15 * mib)
    assert allocator.most_reserved == 40 * mib
    allocator.give(*first)
    allocator.take(16 * mib)  # does not fit into what was freed: the end grows
    assert allocator.most_reserved == 60 * mib
    allocator.take(15 * mib)
    allocator.give(*second)
    allocator.take(100)
    assert allocator.most_reserved == 62 * mib
    assert allocator.allocated == 31 * mib + 512
