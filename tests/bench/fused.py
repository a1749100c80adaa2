"""The fused ops on this card, checked and timed beside torch's: `python tests/bench/fused.py`.

Prints four tables: the relative L2 error of every op against plain torch in float32 at the model's sizes, beside that
of plain torch in bfloat16; element-wise ops beside a copy of as many bytes; 8-bit products beside cuBLAS, `_int_mm` and
`_scaled_mm`, for several tiles; and a block's whole MLP in chunks. About 100 s on an H100; kernels are compiled by one
process for each core first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from lowvram_i2v.device import describe  # noqa: E402
from lowvram_i2v.kernels import fused_gemm, fused_qkv, fused_rows, op_cases, ops, w8a8  # noqa: E402
from lowvram_i2v.kernels.fused_gemm import Tile  # noqa: E402
from lowvram_i2v.kernels.op_cases import CASES, Inputs, Sizes  # noqa: E402
from lowvram_i2v.kernels.row_codes import Codes  # noqa: E402

CUDA, BF16, INT8, FP8 = torch.device("cuda"), torch.bfloat16, torch.int8, torch.float8_e4m3fn
NAMES = {INT8: "int8", FP8: "fp8"}
FUSED, PLAIN = ops.fused(), ops.PLAIN
HIDDEN, MLP, HEADS, DIM = 3072, 12288, 24, 128

TILES = {
    INT8: [Tile(128, 256, 128, 8, 3), Tile(128, 256, 128, 8, 4), Tile(128, 128, 128, 8, 4), Tile(256, 128, 128, 8, 3)],
    FP8: [
        Tile(128, 256, 128, 8, 3),
        Tile(128, 256, 128, 8, 4),
        Tile(128, 128, 128, 8, 4),
        Tile(256, 128, 128, 8, 3),
        Tile(128, 128, 128, 8, 4, True),
    ],
}
"""For Hopper, which has 228 KB of shared memory; other cards get the library's own."""


def tiles(dtype: torch.dtype) -> list[Tile]:
    major = torch.cuda.get_device_capability()[0]
    return TILES[dtype] if major == 9 else [fused_gemm.tile_for(dtype, major)]


def milliseconds(call: Callable[[], object]) -> float:
    """Median of a call, with cold caches."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=8, rep=40, return_mode="median"))


def row(*cells: object) -> None:
    shown = [(f"{c:.0f}" if c >= 100 else f"{c:.3g}") if isinstance(c, float) else str(c) for c in cells]
    print(f"| {' | '.join(shown)} |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def compile_one(unit: str) -> None:
    """Runs one op, or one tile of a product, on a few rows, so that its kernels are in Triton's cache."""
    kind, _, name = unit.partition(":")
    if kind == "case":
        CASES[name].run(FUSED, Inputs(Sizes(256, 16), CUDA, BF16))
    else:
        dtype, number = (INT8, FP8)[kind == "fp8"], int(name)
        make = Inputs(Sizes(256, 16), CUDA, BF16)
        out = torch.empty(256, MLP, dtype=BF16, device=CUDA)
        fused_gemm.launch(make.codes(HIDDEN, dtype), make.weight(MLP, HIDDEN, dtype), out, tile=tiles(dtype)[number])
    torch.cuda.synchronize()


def compile_all() -> None:
    start = time.perf_counter()
    units = [f"case:{name}" for name in CASES]
    units += [f"{NAMES[dtype]}:{n}" for dtype in (INT8, FP8) for n in range(len(tiles(dtype)))]
    waiting, running = units[::-1], []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 2):
            unit = waiting.pop()
            command = [sys.executable, __file__, "--compile", unit]
            running.append((unit, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            running.remove(entry)
            if entry[1].returncode:
                print(f"compiling {entry[0]} failed: {entry[1].communicate()[1][-300:]}")
        time.sleep(0.05)
    print(f"{len(units)} kernels compiled in {time.perf_counter() - start:.0f} s")


def accuracy() -> None:
    head("op, 2048 rows", "fused", "plain bf16")
    sizes = Sizes(2048, 1500)
    for name, case in CASES.items():
        fused = op_cases.error(case, FUSED, sizes, CUDA, BF16)
        row(name, fused, op_cases.error(case, PLAIN, sizes, CUDA, BF16))


def elementwise(rows: int) -> None:
    make = Inputs(Sizes(rows, 1024), CUDA, BF16)
    x, y, vectors = make.normal(rows, HIDDEN), make.normal(rows, HIDDEN), make.vectors()
    out, hidden = torch.empty_like(x), make.normal(rows, MLP)
    qkv, weight = make.normal(rows, 3 * HIDDEN), make.normal32(DIM)
    rope = (make.normal32(rows - 300, DIM // 2), make.normal32(rows - 300, DIM // 2))
    outs = torch.empty(3, rows, HEADS, DIM, dtype=BF16, device=CUDA).unbind()
    copied = milliseconds(lambda: hidden.clone())
    bandwidth = 2 * hidden.nbytes / copied / 1e6
    short, long = x.nbytes, hidden.nbytes
    calls: list[tuple[str, int, Callable[[ops.Ops], object]]] = [
        ("norm, modulate", 2 * short, lambda o: o.layer_norm_modulate(x, vectors, vectors, 1024, out)),
        ("gated residual", 3 * short, lambda o: o.gated_residual_(x, y, vectors, 1024)),
        ("q k norm, rotate", 6 * short, lambda o: o.qkv_norm_rope(qkv, weight, weight, rope, *outs)),
        ("gelu", 2 * long, lambda o: o.gelu(hidden, hidden)),
        ("rows to int8", short * 3 // 2, lambda o: o.row_codes(x, INT8)),
        (
            "norm, modulate, to int8",
            short * 3 // 2,
            lambda o: o.layer_norm_modulate_codes(x, vectors, vectors, 9, INT8),
        ),
        ("norm, modulate, to fp8", short * 3 // 2, lambda o: o.layer_norm_modulate_codes(x, vectors, vectors, 9, FP8)),
        ("gelu, to int8", long * 3 // 2, lambda o: o.gelu_codes(hidden, INT8, None)),
        ("gelu, to fp8", long * 3 // 2, lambda o: o.gelu_codes(hidden, FP8, None)),
        ("attended and gelu, to int8", (short + long) * 3 // 2, lambda o: o.gelu_codes(hidden, INT8, x)),
    ]
    head(f"op, {rows} rows", "ms", "of the copy's bandwidth", "plain torch, ms")
    row("copy", copied, f"1.00 ({bandwidth:.0f} GB/s)", "")
    for name, moved, call in calls:
        took = milliseconds(partial(call, FUSED))
        row(name, took, moved / took / 1e6 / bandwidth, milliseconds(partial(call, PLAIN)))
    for tokens in (1, 4, 8):
        fused_qkv.TOKENS, kept = tokens, fused_qkv.TOKENS
        took = milliseconds(partial(calls[2][2], FUSED))
        row(f"q k norm, rotate: {tokens} tokens a program", took, calls[2][1] / took / 1e6 / bandwidth, "")
        fused_qkv.TOKENS = kept
    for warps in (2, 8):
        fused_rows.warps, held = (lambda width, warps=warps: warps), fused_rows.warps
        for name, moved, call in calls[:2]:
            took = milliseconds(partial(call, FUSED))
            row(f"{name}: {warps} warps", took, moved / took / 1e6 / bandwidth, "")
        fused_rows.warps = held


def separate_int8(x: Codes, weight: w8a8.OpenWeight, out: Tensor) -> Tensor:
    """`_int_mm` and its epilogue as two more passes, in place."""
    product = torch._int_mm(x.codes, weight.codes.t())
    scaled = torch.mul(product, x.scale[:, None], out=product.view(torch.float32))
    assert weight.bias is not None
    return torch.addcmul(weight.bias.float(), scaled, weight.scale, out=out)


def scaled_mm(x: Codes, weight: w8a8.OpenWeight, fast: bool) -> Tensor:
    scale = x.scale[:, None]
    return torch._scaled_mm(
        x.codes, weight.codes.t(), scale, weight.scale, bias=weight.bias, out_dtype=BF16, use_fast_accum=fast
    )


def products(rows: int, columns: int, depth: int) -> None:
    head(f"product [{rows}, {depth}] x [{columns}, {depth}], bias", "TFLOP/s", "against torch", "relative L2")
    make = Inputs(Sizes(rows, 1024), CUDA, BF16)
    x, w = make.normal(rows, depth), make.normal(columns, depth)
    row("bf16 cuBLAS", 2e-9 * rows * columns * depth / milliseconds(lambda: F.linear(x, w)), "", "")
    for dtype in (INT8, FP8):
        products_of(dtype, make.codes(depth, dtype), make.weight(columns, depth, dtype))


def products_of(dtype: torch.dtype, x: Codes, weight: w8a8.OpenWeight) -> None:
    (rows, depth), columns, few = x.codes.shape, len(weight.codes), slice(0, 1024)
    work = 2e-9 * rows * columns * depth
    out = torch.empty(rows, columns, dtype=BF16, device=CUDA)
    exact = PLAIN.linear(Codes(x.codes[few], x.scale[few]), weight, torch.float32)

    def off(made: Tensor) -> float:
        return float((made[few].float() - exact).norm() / exact.norm())

    if dtype == INT8:
        base = milliseconds(lambda: separate_int8(x, weight, out))
        row("_int_mm, then scales and bias", work / base, 1.0, off(separate_int8(x, weight, out)))
        alone = milliseconds(lambda: torch._int_mm(x.codes, weight.codes.t()))
        row("_int_mm alone", work / alone, base / alone, "")
    else:
        base = milliseconds(lambda: scaled_mm(x, weight, False))
        row("_scaled_mm", work / base, 1.0, off(scaled_mm(x, weight, False)))
        fast = milliseconds(lambda: scaled_mm(x, weight, True))
        row("_scaled_mm, fast accumulation", work / fast, base / fast, off(scaled_mm(x, weight, True)))
    for tile in tiles(dtype):
        shown = f"{NAMES[dtype]} {tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"
        shown += ", two-level" * tile.two_level
        run = partial(fused_gemm.launch, x, weight, out, tile=tile)
        try:
            took = milliseconds(run)
        except Exception as error:  # noqa: BLE001
            row(shown, type(error).__name__, str(error)[:80], "")
            continue
        row(shown, work / took, base / took, off(out))


def mlp(rows: int, chunk: int) -> None:
    """norm + modulate, fc1, GELU, fc2, gated residual."""
    head(f"MLP of {rows} rows in chunks of {chunk}", "ms", "TFLOP/s", "against bf16")
    work = 4e-9 * rows * MLP * HIDDEN
    make = Inputs(Sizes(rows, 1024), CUDA, BF16)
    x, vectors = make.normal(rows, HIDDEN), make.vectors()
    up, down = make.normal(MLP, HIDDEN), make.normal(HIDDEN, MLP)
    normed = torch.empty(chunk, HIDDEN, dtype=BF16, device=CUDA)
    parts = x.split(chunk)

    def wide(table: ops.Ops) -> None:
        for part in parts:
            table.layer_norm_modulate(part, vectors, vectors, 0, normed[: len(part)])
            inner = F.linear(normed[: len(part)], up)
            table.gelu(inner, inner)
            table.gated_residual_(part, F.linear(inner, down), vectors, 0)

    def narrow(dtype: torch.dtype, weights: list[w8a8.OpenWeight], epilogues: bool) -> None:
        for part in parts:
            read = FUSED.layer_norm_modulate_codes(part, vectors, vectors, 0, dtype)
            if epilogues:
                inner = FUSED.linear_gelu_codes(read, weights[0], BF16)
                FUSED.linear_gated_residual_(part, inner, weights[1], vectors, 0)
            else:
                inner = FUSED.gelu_codes(FUSED.linear(read, weights[0], BF16), dtype, None)
                FUSED.gated_residual_(part, FUSED.linear(inner, weights[1], BF16), vectors, 0)

    base = milliseconds(lambda: wide(PLAIN))
    row("bf16, plain ops", base, work / base, 1.0)
    took = milliseconds(lambda: wide(FUSED))
    row("bf16, fused ops", took, work / took, base / took)
    for dtype in (INT8, FP8):
        weights = [make.weight(MLP, HIDDEN, dtype), make.weight(HIDDEN, MLP, dtype)]
        for epilogues in (False, True):
            took = milliseconds(partial(narrow, dtype, weights, epilogues))
            shown = "fused into products" if epilogues else "ops between products"
            row(f"{NAMES[dtype]}, {shown}", took, work / took, base / took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", help="one kernel; used by this program itself")
    options = parser.parse_args()
    if options.compile:
        compile_one(options.compile)
        return
    import triton

    print(f"{describe(CUDA)}, Triton {triton.__version__}")
    compile_all()
    accuracy()
    elementwise(34192)
    products(32768, MLP, HIDDEN)
    products(32768, HIDDEN, HIDDEN + MLP)
    for chunk in (4096, 2048):
        mlp(32768, chunk)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
