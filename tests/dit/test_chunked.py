"""Predictions in chunks over a workspace equal the reference and the plain way, whatever the size of the chunks."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import pytest
import torch
from copy_queues import DelayedCopy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from step_inputs import Inputs, assert_same, random_inputs
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from goldens import golden, names, relative_l2, transformer_config, transformer_weights
from lowvram_i2v import attention
from lowvram_i2v.attention import sdpa
from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.dit.workspace import Chunking, Workspace
from lowvram_i2v.kernels.modulate import (
    gated_residual,
    gated_residual_,
    layer_norm_modulate,
    layer_norm_modulate_into,
)
from lowvram_i2v.kernels.qk_norm_rope import qk_norm_rope, qkv_norm_rope_into
from lowvram_i2v.kernels.quant_linear import set_compute
from lowvram_i2v.sampling.denoise import GuidedVelocity
from lowvram_i2v.streaming.load import stream_blocks

CPU = torch.device("cpu")
SMALL = {"hidden_size": 384, "heads": 3, "double_blocks": 2, "single_blocks": 2, "text_dim": 20, "pooled_dim": 12}
CONCAT = {"in_channels": 33, "guidance_embed": False}
HEADS = st.sampled_from([1, 3])


@cache
def small_model(concat: bool) -> HunyuanVideoTransformer:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer(TransformerConfig(**SMALL, **(CONCAT if concat else {}))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def small_inputs(model: HunyuanVideoTransformer, *, size: tuple[int, int], frames: int, text_tokens: int) -> Inputs:
    settings = {"size": size, "frames": frames, "text_tokens": text_tokens, "steps": 1}
    return random_inputs(model.config, **settings, device=CPU, dtype=torch.float32)


def workspace(config: TransformerConfig, image: int, text: int, rows: int, heads: int) -> Workspace:
    """Filled with what must not be read."""
    work = Workspace(config, image, text, Chunking(rows, heads), CPU, torch.float32)
    for buffer in (work.x, work.q, work.k, work.v):
        buffer.fill_(float("nan"))
    return work


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.golden
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (7, None), (64, 1), (10_000, None)])
@pytest.mark.parametrize("name", names("A_", "B_"))
def test_chunks_equal_the_reference(name: str, rows: int, group: int | None) -> None:
    case = golden(name)
    state = transformer_weights(case.info)
    with torch.device("meta"):
        model = HunyuanVideoTransformer(transformer_config(case.info, state)).eval()
    model.load_state_dict(state, assign=True)
    rope = case["in.freqs_cos"][:, ::2], case["in.freqs_sin"][:, ::2]
    rows = max(rows, len(rope[0]) // 40)  # of a large golden, not each token by itself
    out = []
    with torch.inference_mode():
        for sample, mask in enumerate(case["in.text_mask"]):
            valid = int(mask.sum())
            guidance = case["in.guidance"][sample : sample + 1] / 1000 if model.config.guidance_embed else None
            prompt = case["in.text_states"][sample, :valid], case["in.text_states_2"][sample]
            (step,) = model.condition(case["in.t"][sample : sample + 1], *prompt, guidance)
            work = workspace(model.config, len(rope[0]), valid, rows, group or model.config.heads)
            out.append(model.predict(case["in.x"][sample], step, rope, work=work))
    assert relative_l2(torch.stack(out), case["out"]) < 1e-5


@settings(max_examples=20)
@given(
    st.booleans(),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)),
    st.integers(1, 20),
    st.integers(1, 90),
    HEADS,
)
@example(False, (4, 4, 2), 20, 16, 3)  # a chunk ends where the first frame does, and one where the image does
@example(False, (4, 4, 2), 20, 48, 1)
@example(True, (1, 1, 0), 1, 1, 1)
def test_any_chunks_equal_the_plain_way(
    concat: bool, grid: tuple[int, int, int], text_tokens: int, rows: int, heads: int
) -> None:
    model, (w, h, t) = small_model(concat), grid
    inputs = small_inputs(model, size=(16 * w, 16 * h), frames=4 * t + 1, text_tokens=text_tokens)
    image_tokens = len(inputs.rope[0])
    with torch.no_grad():
        expected = model.predict(inputs.latents, inputs.steps[0], inputs.rope)
        work = workspace(model.config, image_tokens, text_tokens, rows, heads)
        assert distance(model.predict(inputs.latents, inputs.steps[0], inputs.rope, work=work), expected) < 2e-6


def test_one_workspace_serves_prompts_and_videos_of_other_lengths() -> None:
    """What a longer prompt left behind changes nothing; bit for bit, with or without autograd or inference mode."""
    model = small_model(False)
    work = workspace(model.config, 40, 15, rows=13, heads=1)
    for size, text_tokens in (((64, 32), 15), ((64, 32), 3), ((48, 16), 15), ((64, 32), 15)):
        inputs = small_inputs(model, size=size, frames=13, text_tokens=text_tokens)
        fresh = workspace(model.config, len(inputs.rope[0]), text_tokens, rows=13, heads=1)
        arguments = inputs.latents, inputs.steps[0], inputs.rope, None
        with torch.inference_mode():
            expected = model.predict(*arguments, fresh)
            assert_same([model.predict(*arguments, work)], [expected])
        assert_same([model.predict(*arguments, work)], [expected])
    with pytest.raises(ValueError, match="47 tokens in a workspace for 20"):
        model.predict(*arguments, workspace(model.config, 10, 10, rows=4, heads=1))


def test_guidance_uses_one_workspace_for_both_prompts() -> None:
    model = small_model(True)
    short, long = (small_inputs(model, size=(64, 32), frames=9, text_tokens=n) for n in (4, 11))
    plain = GuidedVelocity(model, short.steps, long.steps, 3.0, short.rope)
    work = workspace(model.config, 24, 11, rows=10, heads=3)
    chunked = GuidedVelocity(model, short.steps, long.steps, 3.0, short.rope, work=work)
    with torch.inference_mode():
        assert distance(chunked(short.latents, 0), plain(short.latents, 0)) < 1e-5


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_a_backend_that_takes_out_writes_over_the_queries(heads: int) -> None:
    """Or makes a result of its own all the same: bit for bit what one gives that does not take it."""
    model, told = small_model(False), []
    inputs = small_inputs(model, size=(64, 32), frames=9, text_tokens=5)
    work = workspace(model.config, len(inputs.rope[0]), 5, rows=10, heads=heads)

    def there(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        told.append(out is q)
        return q.copy_(sdpa.attend(q, k, v))

    def elsewhere(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return sdpa.attend(q, k, v)

    arguments = inputs.latents, inputs.steps[0], inputs.rope, None, work
    expected = model.predict(*arguments, sdpa.attend)
    assert_same([model.predict(*arguments, backend) for backend in (there, elsewhere)], [expected] * 2)
    assert told == [True] * (len(model.blocks()) * 3 // heads)


@pytest.mark.parametrize("name", attention.BACKENDS)
def test_the_planner_knows_which_backends_take_out(name: str) -> None:
    if attention.PACKAGES.get(name) == "triton":
        pytest.importorskip("triton")
    backend = import_module(attention.BACKENDS[name])
    assert attention.writes(backend.attend) == (name in attention.WRITING)


@pytest.mark.parametrize("heads", [0, 2, 4])
def test_heads_that_do_not_divide_the_models_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match="3 heads"):
        Workspace(TransformerConfig(**SMALL), 10, 10, Chunking(8, heads), CPU, torch.float32)


@pytest.mark.parametrize(
    ("variant", "scheme", "compute"),
    [
        ("token_replace", "bf16", "w8a16"),
        ("latent_concat", "int8", "w8a16"),
        ("latent_concat", "int8", "w8a8"),
    ],
)
def test_streamed_equals_resident_bit_for_bit(variant: str, scheme: str, compute: str, model_once: Made) -> None:
    opened = open_model(model_once(variant, scheme))
    config = opened.header.transformer
    inputs = random_inputs(config, size=(48, 32), frames=9, steps=2, device=CPU, dtype=torch.float32)
    work = workspace(config, len(inputs.rope[0]), 11, rows=13, heads=1)

    def walk(resident: int) -> list[torch.Tensor]:
        latents, velocities = inputs.latents, []
        with (
            opened.load("transformer", build, device=CPU, dtype=torch.float32, only=outside) as transformer,
            stream_blocks(
                opened.files["transformer"],
                transformer.blocks(),
                device=CPU,
                dtype=torch.float32,
                resident=resident,
                slots=2,
                only=lambda name: not is_conditioning(name),
                queue=DelayedCopy(),
            ) as stream,
            torch.inference_mode(),
        ):
            set_compute(transformer, compute)
            for step in inputs.steps:
                velocities.append(transformer.predict(latents, step, inputs.rope, stream, work))
                latents = latents.clone()
                latents[: len(velocities[-1])] += 0.1 * velocities[-1]
        return velocities

    def build() -> HunyuanVideoTransformer:
        return HunyuanVideoTransformer(config)

    def outside(name: str) -> bool:
        return not is_conditioning(name) and not is_in_block(name)

    expected = walk(-1)
    assert_same(walk(0), expected)


DTYPES = pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])


@DTYPES
@given(st.integers(1, 40), st.integers(0, 40), st.booleans())
def test_modulate_and_gate_in_place(
    dtype: torch.dtype, gate: float, tokens: int, first_tokens: int, wide_vectors: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, y = (torch.randn(tokens, 96, generator=generator).to(dtype) + 0.5 for _ in range(2))
    vectors = torch.randn(3, 2, 96, generator=generator).to(torch.float32 if wide_vectors else dtype)
    first_tokens = min(first_tokens, tokens)
    out = torch.full_like(x, float("nan"))
    layer_norm_modulate_into(x, vectors[0], vectors[1], first_tokens, out)
    assert distance(out, layer_norm_modulate(x, vectors[0], vectors[1], first_tokens)) < gate
    expected = gated_residual(x, y, vectors[2], first_tokens)
    gated_residual_(x, y, vectors[2], first_tokens)
    assert distance(x, expected) < gate


@DTYPES
@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 3))
def test_q_k_and_v_are_written_where_attention_reads_them(
    dtype: torch.dtype, gate: float, tokens: int, rotated: int, heads: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, 3 * heads * 16, generator=generator).mul_(7).to(dtype)
    weights = [torch.randn(16, generator=generator) for _ in range(2)]
    rope = tuple(table[: min(rotated, tokens)] for table in rope_table((5, 3, 2), (4, 6, 6), 256.0, 17))
    made = [torch.full((tokens, 2 * heads, 16), float("nan"), dtype=dtype)[:, :heads] for _ in range(3)]
    qkv_norm_rope_into(qkv, *weights, rope, *made)
    q, k, v = qkv.view(tokens, 3, heads, 16).unbind(1)
    assert distance(made[0], qk_norm_rope(q, weights[0], rope)) < gate
    assert distance(made[1], qk_norm_rope(k, weights[1], rope)) < gate
    assert torch.equal(made[2], v)
