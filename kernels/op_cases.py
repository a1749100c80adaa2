"""Inputs for every op of the table, at any size: for tests, for benches, and for a check of the user's own card.

A case makes the tensors, runs its op with a table, and hands back what the op made; `results` runs it with two tables.
The inputs are what breaks careless kernels: an offset and a large channel in the activations, rows that lie apart, a
first frame that ends inside the rows, a rotary table that ends before them, a row of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram_i2v.kernels.chunks import row_chunks
from lowvram_i2v.kernels.ops import PLAIN, Ops
from lowvram_i2v.kernels.w8a8 import LARGEST, Codes, OpenWeight

ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
COARSE = {torch.int8: 0.01, torch.float8_e4m3fn: 0.04}
FEW_BITS = 0.01


@dataclass(frozen=True)
class Sizes:
    """rows: tokens. first: tokens of the first frame among them. The rest as in the transformer's config."""

    rows: int
    first: int
    heads: int = 24
    dim: int = 128
    mlp: int = 12288

    @property
    def hidden(self) -> int:
        return self.heads * self.dim


class Inputs:
    """Seeded tensors of a dtype on a device. wide: the same numbers held in float32."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, wide: bool = False) -> None:
        self.sizes, self.device, self.rounded = sizes, device, dtype
        self.dtype = torch.float32 if wide else dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device).mul_(scale)
        return drawn.to(self.rounded).to(self.dtype)

    def normal32(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def rows(self, width: int) -> Tensor:
        """[rows, width] inside rows that are longer: an offset, a large channel, and a first row of zeros."""
        drawn = self.normal32(self.sizes.rows, width).mul_(2).add_(0.5)
        drawn[:, width // 3] *= 30
        if len(drawn) > 1:
            drawn[0] = 0
        whole = torch.empty(self.sizes.rows, width + 64, device=self.device, dtype=self.dtype)
        return whole[:, :width].copy_(drawn.to(self.rounded))

    def vectors(self) -> Tensor:
        """In float32, as a prediction in chunks has them: what a kernel is compiled for here serves there."""
        return self.normal32(2, self.sizes.hidden).mul_(0.5)

    def weight(self, out: int, into: int, codes: torch.dtype) -> OpenWeight:
        """A weight whose product with values of unit size has about unit size."""
        spread = LARGEST[codes] / 4
        stored = torch.empty(out, into, dtype=codes, device=self.device)
        for rows in row_chunks(out, into):  # a card that is filled to its budget has no room for more
            values = self.normal32(rows.stop - rows.start, into).mul_(spread).clamp_(-LARGEST[codes], LARGEST[codes])
            stored[rows] = values.round_() if codes == torch.int8 else values
        scale = self.normal32(1, out).abs_().add_(0.5).div_(spread * into**0.5)
        return OpenWeight(stored, scale, self.normal32(out) if codes == torch.int8 else self.normal(out))

    def codes(self, width: int, codes: torch.dtype) -> Codes:
        return PLAIN.row_codes(self.rows(width), codes)


def modulated(ops: Ops, make: Inputs) -> Tensor:
    x = make.rows(make.sizes.hidden)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ops.layer_norm_modulate(x, make.vectors(), make.vectors(), make.sizes.first, out)
    return out


def gated(ops: Ops, make: Inputs) -> Tensor:
    x = make.rows(make.sizes.hidden)
    ops.gated_residual_(x, make.normal(*x.shape), make.vectors(), make.sizes.first)
    return x


def rotated(ops: Ops, make: Inputs) -> Tensor:
    rows, heads, dim = make.sizes.rows, make.sizes.heads, make.sizes.dim
    qkv = make.rows(3 * heads * dim).contiguous()
    weights = [make.normal32(dim) for _ in range(2)]
    angles = make.normal32(max(0, rows - 3), dim // 2)
    outs = torch.empty(3, rows, heads + 1, dim, dtype=make.dtype, device=make.device)[:, :, :heads].unbind()
    ops.qkv_norm_rope(qkv, weights[0], weights[1], (angles.cos(), angles.sin()), *outs)
    return torch.stack(outs)


def activated(ops: Ops, make: Inputs) -> Tensor:
    x = make.rows(make.sizes.mlp)
    ops.gelu(x, x)
    return x


def values(codes: Codes) -> Tensor:
    return codes.codes.float() * codes.scale[:, None]


def row_codes(dtype: torch.dtype) -> Callable[[Ops, Inputs], Tensor]:
    return lambda ops, make: values(ops.row_codes(make.rows(make.sizes.hidden), dtype))


def modulated_codes(dtype: torch.dtype) -> Callable[[Ops, Inputs], Tensor]:
    def run(ops: Ops, make: Inputs) -> Tensor:
        x = make.rows(make.sizes.hidden)
        return values(ops.layer_norm_modulate_codes(x, make.vectors(), make.vectors(), make.sizes.first, dtype))

    return run


def activated_codes(dtype: torch.dtype, both: bool) -> Callable[[Ops, Inputs], Tensor]:
    def run(ops: Ops, make: Inputs) -> Tensor:
        beside = make.rows(make.sizes.hidden) if both else None
        return values(ops.gelu_codes(make.normal(make.sizes.rows, make.sizes.mlp), dtype, beside))

    return run


def product(dtype: torch.dtype) -> Callable[[Ops, Inputs], Tensor]:
    def run(ops: Ops, make: Inputs) -> Tensor:
        hidden = make.sizes.hidden
        return ops.linear(make.codes(hidden, dtype), make.weight(3 * hidden, hidden, dtype), make.dtype)

    return run


def product_gated(dtype: torch.dtype) -> Callable[[Ops, Inputs], Tensor]:
    def run(ops: Ops, make: Inputs) -> Tensor:
        into = make.sizes.hidden + make.sizes.mlp
        residual, x = make.rows(make.sizes.hidden), make.codes(into, dtype)
        weight = make.weight(make.sizes.hidden, into, dtype)
        ops.linear_gated_residual_(residual, x, weight, make.vectors(), make.sizes.first)
        return residual

    return run


@dataclass(frozen=True)
class Case:
    """One op at work. op: its field of `Ops`. codes: the 8-bit dtype it makes or reads, if any. coarse: its result is
    in 8 bits, so that a value on the border between two codes may take either."""

    op: str
    run: Callable[[Ops, Inputs], Tensor]
    codes: torch.dtype | None = None
    coarse: bool = False


def cases() -> Iterator[tuple[str, Case]]:
    yield "norm, modulate", Case("layer_norm_modulate", modulated)
    yield "gated residual", Case("gated_residual_", gated)
    yield "q k norm, rotate", Case("qkv_norm_rope", rotated)
    yield "gelu", Case("gelu", activated)
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        yield f"rows to {name}", Case("row_codes", row_codes(dtype), dtype, True)
        yield f"norm, modulate, to {name}", Case("layer_norm_modulate_codes", modulated_codes(dtype), dtype, True)
        yield f"gelu, to {name}", Case("gelu_codes", activated_codes(dtype, False), dtype, True)
        yield f"attended and gelu, to {name}", Case("gelu_codes", activated_codes(dtype, True), dtype, True)
        yield f"{name} product", Case("linear", product(dtype), dtype)
        yield f"{name} product, gated residual", Case("linear_gated_residual_", product_gated(dtype), dtype)


CASES = dict(cases())


def results(case: Case, ops: Ops, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op's result, and that of plain torch in float32 on the same numbers; both float64."""
    actual = case.run(ops, Inputs(sizes, device, dtype)).double()
    return actual, case.run(PLAIN, Inputs(sizes, device, dtype, wide=True)).double()


def error(case: Case, ops: Ops, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """Relative L2 distance of the two."""
    actual, expected = results(case, ops, sizes, device, dtype)
    return float((actual - expected).norm() / expected.norm())


def bound(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """The `error` up to which an op is right: rounding to the dtype, some values that took the neighbouring code, or
    the few bits in which tensor cores add e4m3 products."""
    if case.coarse and case.codes is not None:
        return COARSE[case.codes]
    if case.codes == torch.float8_e4m3fn and device.type == "cuda":
        return FEW_BITS
    return ROUNDING[dtype]


def faults(
    ops: Ops,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    only: Collection[str] | None = None,
    codes: Collection[torch.dtype] = tuple(LARGEST),
) -> dict[str, str]:
    """Op -> what is wrong with it on this device; for `ops.choose(device, refused=faults)`. Waits for the device.

    only: names of the ops that are looked at; None for all. codes: the 8-bit dtypes that they are tried with.
    """
    found = {}
    for name, case in CASES.items():
        if case.codes == torch.float8_e4m3fn and not multiplies_fp8(device):
            continue
        if (only is not None and case.op not in only) or (case.codes is not None and case.codes not in codes):
            continue
        try:
            distance = error(case, ops, sizes, device, dtype)
        except Exception as problem:  # noqa: BLE001 - whatever a compiler or a driver raises, the op is of no use
            found[case.op] = f"{name}: {type(problem).__name__} {str(problem)[:200]}"
            continue
        most = bound(case, dtype, device)
        if not distance <= most:
            found[case.op] = f"{name}: relative error {distance:.2g}, at most {most:.2g} is right"
    return found


def multiplies_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
