"""Predictions in chunks on a CUDA device: the same video, no waiting on the host, and the memory that was stated."""

from __future__ import annotations

import gc

import pytest
import torch
from quantized_blocks import quantize_blocks
from step_inputs import Inputs, random_inputs
from torch import nn

from goldens import golden, names, relative_l2, transformer_config, transformer_weights
from lowvram_i2v import attention
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.dit.workspace import Chunking, Workspace, activation_bytes
from lowvram_i2v.kernels import compute as ways
from lowvram_i2v.kernels.ops import PLAIN, choose
from lowvram_i2v.kernels.quant_linear import set_compute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible here"),
]

WIDE = TransformerConfig(double_blocks=1, single_blocks=2)
"""The released model's width, one or two blocks of each kind."""


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def wide_model(scheme: str | None, compute: str) -> HunyuanVideoTransformer:
    """bfloat16, random weights of a size that keeps activations near 1; quantized on the device."""
    if reason := ways.refusal(compute, scheme, cuda()):
        pytest.skip(reason)
    torch.manual_seed(0)
    with cuda():
        model = HunyuanVideoTransformer(WIDE).to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if scheme is not None:
        quantize_blocks(model, scheme)
    set_compute(model, compute)
    return model


def wide_inputs(size: tuple[int, int], frames: int) -> Inputs:
    return random_inputs(WIDE, size=size, frames=frames, steps=1, device=cuda(), dtype=torch.bfloat16, text_tokens=330)


SCHEMES_AND_WAYS = pytest.mark.parametrize(
    ("scheme", "compute"),
    [(None, "w8a16"), ("int8", "w8a16"), ("int8", "w8a8"), ("fp8", "w8a16"), ("fp8", "w8a8"), ("nf4", "w8a16")],
)


@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", names("A_", "B_"))
@torch.inference_mode()
def test_goldens(name: str, dtype: torch.dtype, gate: float) -> None:
    case = golden(name)
    state = transformer_weights(case.info)
    with torch.device("meta"):
        model = HunyuanVideoTransformer(transformer_config(case.info, state)).eval()
    model.load_state_dict(state, assign=True)
    model = model.to("cuda", dtype)
    valid = int(case["in.text_mask"][0].sum())
    # divided on the CPU: CUDA multiplies with the reciprocal, and the embedder multiplies the difference by 6000
    guidance = (case["in.guidance"][:1] / 1000).cuda() if model.config.guidance_embed else None
    texts = case["in.text_states"][0, :valid].cuda(), case["in.text_states_2"][0].cuda()
    (step,) = model.condition(case["in.t"][:1].cuda(), *texts, guidance)
    rope = case["in.freqs_cos"][:, ::2].cuda(), case["in.freqs_sin"][:, ::2].cuda()
    work = Workspace(model.config, len(rope[0]), valid, Chunking(50, 1), cuda(), dtype)
    out = model.predict(case["in.x"][0].cuda(), step, rope, work=work)
    assert relative_l2(out[None].cpu(), case["out"]) < gate


@SCHEMES_AND_WAYS
@torch.inference_mode()
def test_chunks_equal_the_plain_way_at_full_width(scheme: str | None, compute: str) -> None:
    """Of 8-bit products, whose activations are rounded to 8 bits, each way lands elsewhere: there the test is that
    chunks are no further from the exact product than the plain way is."""
    model, inputs = wide_model(scheme, compute), wide_inputs((384, 256), 17)
    arguments = inputs.latents, inputs.steps[0], inputs.rope, None
    expected, gate = model.predict(*arguments), 0.03
    if compute == "w8a8":
        set_compute(model, "w8a16")
        exact = model.predict(*arguments)
        gate = 1.05 * distance(expected, exact)
        expected = exact
        set_compute(model, "w8a8")
    for chunking in (Chunking(1000, 4), Chunking(8192, 24)):
        for ops in (PLAIN, choose(cuda())):
            work = Workspace(WIDE, len(inputs.rope[0]), 330, chunking, cuda(), torch.bfloat16, ops)
            assert distance(model.predict(*arguments, work), expected) < gate, chunking


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@SCHEMES_AND_WAYS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunking", [Chunking(1024, 4), Chunking(4096, 8), Chunking(4096, 24)], ids=str)
@torch.inference_mode()
def test_the_peak_is_as_stated_and_nothing_waits(
    scheme: str | None, compute: str, chunking: Chunking, fused: bool
) -> None:
    """Plain torch takes what is stated; fused kernels, which make no float32 copies, at most that."""
    ops = choose(cuda()) if fused else PLAIN
    model, inputs = wide_model(scheme, compute), wide_inputs((640, 384), 65)
    tokens = len(inputs.rope[0]), 330
    arguments = inputs.latents, inputs.steps[0], inputs.rope, None
    stated = activation_bytes(WIDE, *tokens, chunking, scheme=scheme, compute=compute, element=2)

    def predict() -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work = Workspace(WIDE, *tokens, chunking, cuda(), torch.bfloat16, ops)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.predict(*arguments, work)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    predict()  # libraries take their workspaces, tables that are kept are made
    gc.collect()
    # attention's own statistics and rounding to blocks of 512 bytes are not counted
    taken = predict()
    assert taken < 1.02 * stated
    assert taken > (0.8 if fused else 0.98) * stated


@pytest.mark.parametrize("name", attention.WRITING)
@torch.inference_mode()
def test_attention_over_the_queries_gives_the_same_bits(name: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1000, 4, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    attend = attention.get(name)
    for heads in (slice(0, 1), slice(1, 4)):
        group = q[:, heads], k[:, heads], v[:, heads]
        expected = attend(*group)
        attention.attend_over(attend, *group)
        assert torch.equal(q[:, heads], expected)


@torch.inference_mode()
def test_a_video_of_more_than_2_to_the_31_values() -> None:
    """q, k, v and x of 720000 tokens: the last ones must come out as by themselves. Attention is left out."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free video memory")
    model = wide_model("int8", "w8a16")
    model.attend = lambda q, k, v: v.clone()
    inputs = wide_inputs((1280, 720), 4 * 199 + 1)
    image, last = len(inputs.rope[0]), 2 * 45 * 80
    assert image * WIDE.hidden_size > 2**31
    work = Workspace(WIDE, image, 330, Chunking(4096, 24), cuda(), torch.bfloat16)
    out = model.predict(inputs.latents, inputs.steps[0], inputs.rope, work=work)
    rope = tuple(torch.cat([table[: 45 * 80], table[-last:]]) for table in inputs.rope)
    latents = torch.cat([inputs.latents[:, :1], inputs.latents[:, -2:]], dim=1)
    small = Workspace(WIDE, len(rope[0]), 330, Chunking(4096, 24), cuda(), torch.bfloat16)
    expected = model.predict(latents, inputs.steps[0], rope, work=small)
    assert float((out[:, -2:] - expected[:, -2:]).norm() / expected[:, -2:].norm()) < 0.01
