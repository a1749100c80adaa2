"""The fused ops' kernels as variants to compile: whatever each op launches at the model's sizes, for each card.

The ops run on tensors without memory, and what they would have launched is written down instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from compile import Variant
from torch import Tensor
from triton.runtime.jit import JITFunction

from lowvram_i2v.kernels import fused_gemm, ops
from lowvram_i2v.kernels.row_codes import Codes
from lowvram_i2v.kernels.w8a8 import OpenWeight

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}
CARDS = ("sm_86", "sm_89", "sm_90", "sm_120")
ROWS, HEADS, DIM, MLP = 4096, 24, 128, 12288
HIDDEN = HEADS * DIM


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(out: int, into: int, codes: torch.dtype) -> OpenWeight:
    return OpenWeight(empty(out, into, dtype=codes), empty(1, out, dtype=torch.float32), empty(out))


def calls(codes: torch.dtype | None) -> dict[str, Any]:
    """Name -> what calls an op with a table; those without 8-bit values, or those of one 8-bit dtype."""
    x, vectors = empty(ROWS, HIDDEN), empty(2, HIDDEN)
    if codes is None:
        channel, table = empty(DIM, dtype=torch.float32), empty(ROWS, DIM // 2, dtype=torch.float32)
        heads = empty(ROWS, HEADS, DIM)
        return {
            "norm, modulate": lambda o: o.layer_norm_modulate(x, vectors, vectors, 9, empty(ROWS, HIDDEN)),
            "gated residual": lambda o: o.gated_residual_(x, x, vectors, 9),
            "q k norm, rotate": lambda o: o.qkv_norm_rope(
                empty(ROWS, 3 * HIDDEN), channel, channel, (table, table), heads, heads, heads
            ),
            "gelu": lambda o: o.gelu(empty(ROWS, MLP), empty(ROWS, HIDDEN + MLP)[:, HIDDEN:]),
        }
    read = Codes(empty(ROWS, HIDDEN, dtype=codes), empty(ROWS, dtype=torch.float32))
    return {
        "rows": lambda o: o.row_codes(x, codes),
        "norm, modulate": lambda o: o.layer_norm_modulate_codes(x, vectors, vectors, 9, codes),
        "gelu": lambda o: o.gelu_codes(empty(ROWS, MLP), codes, None),
        "attended and gelu": lambda o: o.gelu_codes(empty(ROWS, MLP), codes, x),
        "product": lambda o: o.linear(read, weight(3 * HIDDEN, HIDDEN, codes), torch.bfloat16),
        "product, gated": lambda o: o.linear_gated_residual_(x, read, weight(HIDDEN, HIDDEN, codes), vectors, 9),
    }


@contextmanager
def recorded(card: str) -> Iterator[list[tuple[Any, dict[str, Any], int, int]]]:
    """Launches of any kernel as (kernel, arguments, warps, stages), as on a card of this kind."""
    launches = []

    def run(
        self: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, num_stages: int = 3, **named: Any
    ) -> None:
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | named, num_warps, num_stages))

    with (
        patch.object(JITFunction, "run", run),
        patch.object(fused_gemm, "capability", lambda device: int(card[3:]) // 10),
    ):
        yield launches


def variant(name: str, card: str, launch: tuple[Any, dict[str, Any], int, int]) -> Variant:
    kernel, arguments, warps, stages = launch
    types, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            types[parameter.name] = f"*{TYPES[value.dtype]}"
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            constants[parameter.name] = value
        else:
            types[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(parameter.name)
    return Variant(f"{name}: {kernel.__name__}", kernel, types, constants, int(card[3:]), warps, stages, tuple(aligned))


def variants() -> list[tuple[str, Variant]]:
    found, table = [], ops.fused()
    for card in CARDS:
        kinds = [None, torch.int8] if card == "sm_86" else [None, torch.int8, torch.float8_e4m3fn]
        for codes in kinds:
            for name, call in calls(codes).items():
                with recorded(card) as launches:
                    call(table)
                shown = name if codes is None else f"{name}, {TYPES[codes]}"
                found += [(card, variant(shown, card, launch)) for launch in launches]
    return found
