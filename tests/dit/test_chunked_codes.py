"""Blocks in 8 bits from norm to residual: the numbers of the layers one by one, and one way for every mix of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from quantized_blocks import quantize_blocks
from step_inputs import Inputs, random_inputs
from torch import Tensor, nn

from lowvram_i2v.dit import chunked
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.dit.workspace import Chunking, Workspace
from lowvram_i2v.kernels.ops import PLAIN, Ops
from lowvram_i2v.kernels.quant_linear import set_compute

CPU = torch.device("cpu")
CONFIG = TransformerConfig(hidden_size=256, heads=2, double_blocks=1, single_blocks=1, text_dim=20, pooled_dim=12)
TEXT = 7
ROUNDING = 5e-4
"""What values do that float32 rounding moves over the border between two codes; 8 bits cost 20 times more."""

BOTH = pytest.mark.parametrize("scheme", ["int8", "fp8"])


@cache
def quantized_model(scheme: str) -> HunyuanVideoTransformer:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer(CONFIG, attend=of_each_token).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    quantize_blocks(model, scheme)
    return model


def of_each_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of attention: what the number of heads at a time does not round differently."""
    return q * k.sign() + v


def inputs() -> Inputs:
    return random_inputs(CONFIG, size=(48, 32), frames=9, text_tokens=TEXT, steps=1, device=CPU, dtype=torch.float32)


def predict(model: HunyuanVideoTransformer, given: Inputs, rows: int | None, ops: Ops = PLAIN) -> Tensor:
    """rows: of a chunk; None: not in chunks, layer by layer."""
    work = (
        None
        if rows is None
        else Workspace(CONFIG, len(given.rope[0]), TEXT, Chunking(rows, 1), CPU, torch.float32, ops)
    )
    with torch.inference_mode():
        return model.predict(given.latents, given.steps[0], given.rope, work=work)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@BOTH
def test_the_chain_equals_the_layers_one_by_one(scheme: str) -> None:
    """Up to rounding, whatever the size of the chunks: a row's codes depend on the row only."""
    model, given = quantized_model(scheme), inputs()
    set_compute(model, "w8a16")
    wide = predict(model, given, None)
    set_compute(model, "w8a8")
    expected = predict(model, given, None)
    assert 0.003 < distance(expected, wide) < 0.05
    for rows in (5, 1000):
        assert distance(predict(model, given, rows), expected) < ROUNDING


@pytest.mark.parametrize("narrow", ["linear1", "linear2", "fc1", "fc2", "proj"])
def test_layers_in_8_and_in_16_bits_stand_side_by_side(narrow: str) -> None:
    """Each makes its rows in the form that the next one multiplies."""
    model, given = quantized_model("int8"), inputs()
    set_compute(model, "w8a16")
    set_compute(model, "w8a8", only=lambda path: path.endswith(narrow))
    assert distance(predict(model, given, 5), predict(model, given, None)) < ROUNDING


def counting(ops: Ops, calls: list[str]) -> Ops:
    def counted(name: str) -> Callable[..., object]:
        def call(*given: object) -> object:
            calls.append(name)
            return getattr(ops, name)(*given)

        return call

    return replace(ops, **{field.name: counted(field.name) for field in fields(ops)})


@BOTH
def test_nothing_between_layers_is_in_16_bits_but_what_must_be(scheme: str) -> None:
    """Ops of a chunk: the norm's result, GELU's and attention's go to the next product as codes."""
    model, given, calls = quantized_model(scheme), inputs(), []
    set_compute(model, "w8a8")
    predict(model, given, 1000, counting(PLAIN, calls))
    project = ["layer_norm_modulate_codes", "linear", "qkv_norm_rope"]
    finish = ["row_codes", "linear_gated_residual_", "layer_norm_modulate_codes", "linear", "gelu_codes"]
    double = 2 * project + 2 * [*finish, "linear_gated_residual_"]
    single = [*project, "layer_norm_modulate_codes", "linear", "gelu_codes", "linear_gated_residual_"]
    assert calls == CONFIG.double_blocks * double + CONFIG.single_blocks * single + ["layer_norm_modulate"]
    assert set(calls) | {"gelu", "gated_residual_"} == set(chunked.OPS)
