"""The fused ops against plain torch: on a CUDA device, or by Triton's interpreter (`test_fused_in_interpreter.py`)."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_blocks import quantize_blocks
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

from lowvram_i2v.dit.config import TransformerConfig  # noqa: E402
from lowvram_i2v.dit.rope import rope_table, token_grid  # noqa: E402
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer  # noqa: E402
from lowvram_i2v.dit.workspace import Chunking, Workspace  # noqa: E402
from lowvram_i2v.kernels import op_cases, ops  # noqa: E402
from lowvram_i2v.kernels.op_cases import CASES, Case, Inputs, Sizes  # noqa: E402
from lowvram_i2v.kernels.quant_linear import set_compute  # noqa: E402
from lowvram_i2v.kernels.w8a8 import Codes, OpenWeight  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FP8 = torch.float8_e4m3fn
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies bfloat16 wrongly
SMALL = [Sizes(1, 0, 2, 16, 48), Sizes(7, 2, 3, 32, 96), Sizes(5, 5, 8, 16, 272)]
TALL = Sizes(131, 130, 2, 16, 272)
"""More rows and columns than a tile of the product has, and odd numbers of both."""


def fused() -> ops.Ops:
    return ops.fused()


def without_lost_carries(actual: Tensor, expected: Tensor) -> Tensor:
    """The interpreter's cast to e4m3 loses the carry of a mantissa that rounds up to the next power of two: half the
    value comes out. Such values are taken for right."""
    return torch.where(torch.isclose(expected, 2 * actual, rtol=1e-5), expected, actual)


def check(case: Case, sizes: Sizes, dtype: torch.dtype) -> None:
    actual, expected = op_cases.results(case, fused(), sizes, DEVICE, dtype)
    if INTERPRETED and case.codes == FP8 and case.coarse:
        actual = without_lost_carries(actual, expected)
    error = float((actual - expected).norm() / expected.norm())
    assert error <= op_cases.bound(case, dtype, DEVICE)


@pytest.mark.parametrize("sizes", SMALL, ids=lambda sizes: f"{sizes.rows} rows")
@pytest.mark.parametrize("name", CASES)
def test_an_op_computes_what_plain_torch_does(name: str, sizes: Sizes) -> None:
    check(CASES[name], sizes, torch.float32)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.coarse])
def test_in_16_bits(name: str) -> None:
    check(CASES[name], SMALL[1], HALF)


@pytest.mark.parametrize("name", ["int8 product", "int8 product, gated residual", "fp8 product"])
def test_a_product_of_several_tiles(name: str) -> None:
    check(CASES[name], TALL, torch.float32)


@pytest.mark.parametrize("cut", [1, 3])
def test_chunks_of_rows_change_no_bit(cut: int) -> None:
    make, table = Inputs(SMALL[1], DEVICE, HALF), fused()
    x, y, vectors, first = make.rows(96), make.normal(7, 96), make.vectors(), 2
    whole, parts = torch.empty(2, 7, 96, dtype=HALF, device=DEVICE)
    table.layer_norm_modulate(x, vectors, vectors, first, whole)
    ranges = [slice(0, cut), slice(cut, 7)]
    for rows in ranges:
        own = min(max(first - rows.start, 0), rows.stop - rows.start)
        table.layer_norm_modulate(x[rows], vectors, vectors, own, parts[rows])
    assert torch.equal(whole, parts)
    both = [whole.clone(), whole.clone()]
    table.gated_residual_(both[0], y, vectors, first)
    for rows in ranges:
        own = min(max(first - rows.start, 0), rows.stop - rows.start)
        table.gated_residual_(both[1][rows], y[rows], vectors, own)
    assert torch.equal(*both)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("cut", [1, 3])
def test_chunks_of_rows_change_no_bit_of_codes(cut: int, plain: bool) -> None:
    """From norm to residual in int8: each row has its own scale, and sums of integers are exact."""
    make, table, first = Inputs(SMALL[1], DEVICE, torch.float32), ops.PLAIN if plain else fused(), 2
    up, down = make.weight(272, 96, torch.int8), make.weight(96, 272 + 96, torch.int8)
    start, vectors = make.rows(96), make.vectors()
    whole, parts = start.clone(), start.clone()
    for out, cuts in ((whole, [0, 7]), (parts, [0, cut, 7])):
        for begin, end in pairwise(cuts):
            rows, own = slice(begin, end), min(max(first - begin, 0), end - begin)
            normed = table.layer_norm_modulate_codes(out[rows], vectors, vectors, own, torch.int8)
            inner = table.gelu_codes(table.linear(normed, up, torch.float32), torch.int8, out[rows])
            table.linear_gated_residual_(out[rows], inner, down, vectors, own)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, start)


def far_apart(x: Tensor) -> Tensor:
    """The same rows, 2^30 values from one another: from the third on, offsets do not fit 32 bits."""
    whole = torch.empty((len(x) - 1) * 2**30 + x.shape[1], dtype=x.dtype, device=x.device)
    return whole.as_strided(x.shape, (2**30, 1)).copy_(x)


@pytest.mark.parametrize("op", ["norm", "gated", "gelu", "rows", "qkv", "product", "product into"])
def test_rows_beyond_32_bits(op: str) -> None:
    make, table = Inputs(Sizes(4, 1, 2, 16, 48), DEVICE, HALF), fused()
    x, vectors, y = make.rows(32).contiguous(), make.vectors(), make.normal(4, 32)
    codes, weight = make.codes(32, torch.int8), make.weight(32, 32, torch.int8)
    if op == "norm":
        near, far = torch.empty_like(x), torch.empty_like(x)
        table.layer_norm_modulate(x, vectors, vectors, 1, near)
        table.layer_norm_modulate(far_apart(x), vectors, vectors, 1, far)
    elif op == "gated":
        near, far = x.clone(), far_apart(x)
        table.gated_residual_(near, y, vectors, 1)
        table.gated_residual_(far, y, vectors, 1)
    elif op == "gelu":
        near, far = torch.empty_like(x), far_apart(x)
        table.gelu(x, near)
        table.gelu(far, far)
    elif op == "rows":
        near, far = (table.row_codes(rows, torch.int8).codes for rows in (x, far_apart(x)))
    elif op == "qkv":
        qkv, channel, angles = make.rows(96).contiguous(), make.normal32(16), make.normal32(3, 8)
        near, far = torch.empty(2, 3, 4, 2, 16, dtype=HALF, device=DEVICE)
        table.qkv_norm_rope(qkv, channel, channel, (angles.cos(), angles.sin()), *near.unbind())
        table.qkv_norm_rope(far_apart(qkv), channel, channel, (angles.cos(), angles.sin()), *far.unbind())
    elif op == "product":
        near = table.linear(codes, weight, HALF)
        far = table.linear(Codes(far_apart(codes.codes), codes.scale), weight, HALF)
    else:
        near, far = x.clone(), far_apart(x)
        table.linear_gated_residual_(near, codes, weight, vectors, 1)
        table.linear_gated_residual_(far, codes, weight, vectors, 1)
    assert torch.equal(near, far)
    assert near.float().norm() > 0


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_spoils_its_row_only(what: float) -> None:
    make, table = Inputs(Sizes(4, 0, 2, 16, 48), DEVICE, HALF), fused()
    x, weight = make.rows(32), make.weight(48, 32, torch.int8)
    x[2, 5] = what
    for codes in (
        table.row_codes(x, torch.int8),
        table.layer_norm_modulate_codes(x, *[make.vectors()] * 2, 0, torch.int8),
    ):
        finite = table.linear(codes, weight, torch.float32).isfinite().all(1)
        assert finite.tolist() == [True, True, False, True]


@given(st.integers(1, 300), st.floats(-30, 30), st.integers(0, 2**31))
@settings(max_examples=15)
def test_codes_are_within_half_a_step(width: int, exponent: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, width, generator=generator) * 2.0**exponent).to(DEVICE)
    made = fused().row_codes(x, torch.int8)
    assert made.codes.abs().amax(1).tolist() == [127, 127]
    distance = (made.codes.double() * made.scale.double()[:, None] - x.double()).abs()
    assert bool((distance <= made.scale.double()[:, None] * (0.5 + 1e-4)).all())


def test_a_product_without_bias() -> None:
    make = Inputs(SMALL[1], DEVICE, torch.float32)
    weight = make.weight(40, 96, torch.int8)
    weight, codes = OpenWeight(weight.codes, weight.scale, None), make.codes(96, torch.int8)
    expected = ops.PLAIN.linear(codes, weight, torch.float32)
    torch.testing.assert_close(fused().linear(codes, weight, torch.float32), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_used_is_not_tried() -> None:
    """A run in int8 compiles nothing for e4m3, one in 16 bits nothing for either."""
    tried = []
    table = replace(ops.PLAIN, row_codes=lambda x, dtype: tried.append(dtype), gelu=lambda x, out: tried.append("gelu"))
    for codes in ((torch.int8,), ()):
        op_cases.faults(table, SMALL[1], DEVICE, HALF, ("gelu", "row_codes"), codes)
    assert tried == ["gelu", torch.int8, "gelu"]


def test_faults_are_found() -> None:
    def twice(x: Tensor, out: Tensor) -> None:
        out.copy_(2 * x)

    def broken(x: Tensor, dtype: torch.dtype) -> Codes:
        raise RuntimeError("no kernel image")

    table = replace(ops.PLAIN, gelu=twice, row_codes=broken)
    found = op_cases.faults(table, SMALL[1], DEVICE, HALF)
    assert set(found) == {"gelu", "row_codes"}
    assert "no kernel image" in found["row_codes"]


@pytest.mark.parametrize(("scheme", "gate"), [(None, 1e-4), ("int8", 2e-3)])
@torch.inference_mode()
def test_a_transformer_with_fused_ops(scheme: str | None, gate: float) -> None:
    """In int8, values on the border between two codes may take either."""
    config = TransformerConfig(hidden_size=256, heads=2, double_blocks=1, single_blocks=1, text_dim=64, pooled_dim=48)
    torch.manual_seed(0)
    model = HunyuanVideoTransformer(config).to(DEVICE).eval()
    if scheme is not None:
        quantize_blocks(model, scheme)
        set_compute(model, "w8a8")
    rope = tuple(
        table.to(DEVICE) for table in rope_table(token_grid(5, 32, 32), config.rope_dims, config.rope_theta, 5)
    )
    latents, texts = torch.randn(16, 2, 4, 4, device=DEVICE), torch.randn(3, 64, device=DEVICE)
    (step,) = model.condition(
        torch.tensor([700.0], device=DEVICE), texts, torch.randn(48, device=DEVICE), torch.tensor([6.0], device=DEVICE)
    )
    made = []
    for table in (ops.PLAIN, fused()):
        work = Workspace(config, len(rope[0]), len(texts), Chunking(5, 1), DEVICE, torch.float32, table)
        made.append(model.predict(latents, step, rope, work=work).double())
    assert float((made[1] - made[0]).norm() / made[0].norm()) < gate
