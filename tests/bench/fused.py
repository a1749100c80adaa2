"""The fused ops on this card, timed beside torch's: `python tests/bench/fused.py`. Under 60 s on an H100; `--quick`,
with products of 4096 rows only, under 45 s.

Prints three tables: element-wise ops beside a copy of as many bytes; 8-bit products at the model's shapes, with what
follows them in the model, beside `_scaled_mm` and `_int_mm` and the same as passes of their own, for several tiles (a
tile's name is its line in `fused_gemm.TILES`); and whole blocks in chunks, in 16 and in 8 bits. Kernels are compiled
first, by one process for each core. Errors: `lowvram-i2v check-kernels`.

Times are those of CUDA graphs: of the device alone, however slow the host launches. What launching takes the host
stands beside (a host that is slower than the device showed 0.40 of the bandwidth where 0.93 were right). Plain torch is
timed with its host, as it would run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from quantized_blocks import quantize_blocks  # noqa: E402
from step_inputs import Inputs as StepInputs  # noqa: E402
from step_inputs import random_inputs  # noqa: E402

from lowvram_i2v.attention.sdpa import attend as sdpa  # noqa: E402
from lowvram_i2v.device import describe  # noqa: E402
from lowvram_i2v.dit import chunked  # noqa: E402
from lowvram_i2v.dit.config import TransformerConfig  # noqa: E402
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer  # noqa: E402
from lowvram_i2v.dit.workspace import Chunking, Workspace  # noqa: E402
from lowvram_i2v.kernels import fused_gemm, fused_rows, ops, w8a8  # noqa: E402
from lowvram_i2v.kernels.fused_gemm import Tile  # noqa: E402
from lowvram_i2v.kernels.op_cases import CASES, Inputs, Sizes, multiplies_fp8  # noqa: E402
from lowvram_i2v.kernels.quant_linear import set_compute  # noqa: E402
from lowvram_i2v.kernels.w8a8 import Codes  # noqa: E402

CUDA, BF16, INT8, FP8 = torch.device("cuda"), torch.bfloat16, torch.int8, torch.float8_e4m3fn
NAMES = {INT8: "int8", FP8: "fp8"}
FUSED, PLAIN = ops.fused(), ops.PLAIN
HIDDEN, MLP, HEADS, DIM = 3072, 12288, 24, 128
FIRST = 1024
TILES = {
    9: [
        Tile(128, 256, 128, 8, 4),
        Tile(256, 128, 128, 8, 3),
        Tile(128, 128, 128, 4, 3),
    ]
}
SMALL = [
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(256, 128, 64, 8, 3),
]
"""For cards with 99 KB of shared memory."""
NORMS = [1, 2, 4]
"""Warps of a program of norm and modulate to int8."""


@dataclass(frozen=True)
class Shape:
    """A product of the model: columns, depth, and what comes after it."""

    name: str
    columns: int
    depth: int
    then: str = ""


SHAPES = [
    Shape("q, k, v", 3 * HIDDEN, HIDDEN),
    Shape("fc1, GELU, codes", MLP, HIDDEN, "gelu"),
    Shape("fc2, gated residual", HIDDEN, MLP, "gated"),
    Shape("linear2, gated residual", HIDDEN, HIDDEN + MLP, "gated"),
]


def dtypes() -> list[torch.dtype]:
    return [INT8, FP8] if multiplies_fp8(CUDA) else [INT8]


def tiles() -> list[Tile]:
    return TILES.get(torch.cuda.get_device_capability()[0], SMALL)


def tile_in_use(dtype: torch.dtype) -> Tile:
    return fused_gemm.tile_for(dtype, torch.cuda.get_device_capability()[0])


def milliseconds(call: Callable[[], object], rep: int = 30, calls: int = 1) -> tuple[float, float]:
    """Median and least time of a call on the device. rep: milliseconds of calls. calls: in a row, with cold caches
    before the first; as much memory as several of them touch makes the others cold, too."""
    from triton.testing import do_bench

    call()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        replay: Callable[[], object] = graph.replay
    except RuntimeError as error:
        print(f"the next line is timed with its host: {str(error)[:100]!r}", flush=True)
        replay, calls = call, 1
    times = do_bench(replay, warmup=8, rep=rep, return_mode="all")
    return statistics.median(times) / calls, min(times) / calls


def median(call: Callable[[], object], rep: int = 30) -> float:
    return milliseconds(call, rep)[0]


def with_host(call: Callable[[], object]) -> float:
    """Median time of a call as the host launches it."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=8, rep=30, return_mode="median"))


def launching(call: Callable[[], object]) -> float:
    """Milliseconds that the host takes to launch a call: the device has a queue and is not waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(30):
        call()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * took / 30


def row(*cells: object) -> None:
    shown = [(f"{c:.0f}" if c >= 100 else f"{c:.3g}") if isinstance(c, float) else str(c) for c in cells]
    print(f"| {' | '.join(shown)} |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def units() -> list[str]:
    """What has to be compiled: ops, and tiles with what follows."""
    found = [f"case:{name}" for name, case in CASES.items() if case.codes in (None, *dtypes())]
    found += [f"norm:{n}" for n in range(len(NORMS))]
    return [
        f"{NAMES[dtype]}:{n}:{then}" for dtype in dtypes() for n in range(len(tiles())) for then in ("", "gated")
    ] + found


def compile_one(unit: str) -> None:
    """Runs one op, or one tile of a product, on a few rows, so that its kernels are in Triton's cache."""
    kind, _, name = unit.partition(":")
    if kind == "case":
        CASES[name].run(FUSED, Inputs(Sizes(256, 16), CUDA, BF16))
    elif kind == "norm":
        make = Inputs(Sizes(256, 16), CUDA, BF16)
        norm_by(int(name), make.normal(256, HIDDEN), make.vectors(), Codes.empty(256, HIDDEN, INT8, CUDA))
    else:
        dtype, (number, then) = (INT8, FP8)[kind == "fp8"], name.split(":")
        shape = next(shape for shape in SHAPES if shape.then == then)
        Product(shape, 256, dtype).by_kernel(tiles()[int(number)])
    torch.cuda.synchronize()


def compile_all() -> None:
    start, waiting = time.perf_counter(), units()
    cores = os.cpu_count() or 2
    running = [
        subprocess.Popen([sys.executable, __file__, "--compile", *waiting[n::cores]], text=True) for n in range(cores)
    ]
    for process in running:
        process.wait()
    print(f"{len(waiting)} ops and tiles compiled in {time.perf_counter() - start:.0f} s")


def elementwise(rows: int) -> None:
    make = Inputs(Sizes(rows, FIRST), CUDA, BF16)
    x, y, vectors = make.normal(rows, HIDDEN), make.normal(rows, HIDDEN), make.vectors()
    out, hidden = torch.empty_like(x), make.normal(rows, MLP)
    qkv, weight = make.normal(rows, 3 * HIDDEN), make.normal32(DIM)
    rope = (make.normal32(rows - 300, DIM // 2), make.normal32(rows - 300, DIM // 2))
    outs = torch.empty(3, rows, HEADS, DIM, dtype=BF16, device=CUDA).unbind()
    copy = torch.empty_like(hidden)
    copied = milliseconds(lambda: copy.copy_(hidden), 60, 4)
    bandwidth = 2 * hidden.nbytes / copied[0] / 1e6
    short, long = x.nbytes, hidden.nbytes
    calls: list[tuple[str, int, Callable[[ops.Ops], object]]] = [
        ("norm, modulate", 2 * short, lambda o: o.layer_norm_modulate(x, vectors, vectors, FIRST, out)),
        ("gated residual", 3 * short, lambda o: o.gated_residual_(x, y, vectors, FIRST)),
        ("q k norm, rotate", 6 * short, lambda o: o.qkv_norm_rope(qkv, weight, weight, rope, *outs)),
        ("gelu", 2 * long, lambda o: o.gelu(hidden, hidden)),
    ]
    for dtype in dtypes():
        name, bytes_of = NAMES[dtype], 3 / 2  # two read and one written, for every two
        normed = partial(codes_of, "layer_norm_modulate_codes", x, vectors, vectors, FIRST, dtype)
        calls += [
            (f"rows to {name}", int(short * bytes_of), partial(codes_of, "row_codes", x, dtype)),
            (f"norm, modulate, to {name}", int(short * bytes_of), normed),
            (f"gelu, to {name}", int(long * bytes_of), partial(codes_of, "gelu_codes", hidden, dtype, None)),
            (
                f"attended and gelu, to {name}",
                int((short + long) * bytes_of),
                partial(codes_of, "gelu_codes", hidden, dtype, x),
            ),
        ]
    head(f"op, {rows} rows", "ms (least)", "of the copy's bandwidth", "launching, ms", "plain torch with its host, ms")
    row("copy", f"{copied[0]:.3g} ({copied[1]:.3g})", f"1.00 ({bandwidth:.0f} GB/s)", "", "")
    for name, moved, call in calls:
        run = partial(call, FUSED)
        took, least = milliseconds(run, 60, 4)
        share = moved / took / 1e6 / bandwidth
        row(name, f"{took:.3g} ({least:.3g})", share, launching(run), with_host(partial(call, PLAIN)))
    made = Codes.empty(rows, HIDDEN, INT8, CUDA)
    for n, warps in enumerate(NORMS):
        took, least = milliseconds(partial(norm_by, n, x, vectors, made), 60, 4)
        share = 1.5 * short / took / 1e6 / bandwidth
        row(f"norm, modulate, to int8: {warps} warps", f"{took:.3g} ({least:.3g})", share, "", "")
    again = milliseconds(lambda: copy.copy_(hidden), 60, 4)[0]
    row("copy again", again, copied[0] / again, "", "")


def norm_by(number: int, x: Tensor, vectors: Tensor, made: Codes) -> None:
    fused_rows.launch_modulate(x, vectors, vectors, FIRST, made.codes, made.scale, NORMS[number])


def codes_of(op: str, *given: object) -> Codes:
    """An op of the table that comes last."""
    *arguments, table = given
    return getattr(table, op)(*arguments)  # type: ignore[no-any-return]


class Product:
    """A product of the model on random rows, and what follows it: by our kernel, or by torch's library."""

    def __init__(self, shape: Shape, rows: int, dtype: torch.dtype) -> None:
        make = Inputs(Sizes(rows, FIRST), CUDA, BF16)
        self.dtype, self.then = dtype, shape.then
        self.x, self.weight = make.codes(shape.depth, dtype), make.weight(shape.columns, shape.depth, dtype)
        self.out = torch.empty(rows, shape.columns, dtype=BF16, device=CUDA)
        self.residual, self.gate = make.normal(rows, HIDDEN), make.vectors()

    def by_kernel(self, tile: Tile) -> object:
        run = partial(fused_gemm.launch, self.x, self.weight, tile=tile)
        if self.then == "gated":
            return run(self.residual, gate=self.gate, first_tokens=FIRST)
        run(self.out)
        return fused_rows.gelu_codes(self.out, self.dtype) if self.then == "gelu" else self.out

    def in_use(self) -> object:
        """As the model does it on this card."""
        if self.then == "gated":
            return FUSED.linear_gated_residual_(self.residual, self.x, self.weight, self.gate, FIRST)
        made = FUSED.linear(self.x, self.weight, BF16)
        return FUSED.gelu_codes(made, self.dtype, None) if self.then == "gelu" else made

    def by_library(self) -> Tensor:
        """With scales and bias: two more passes of an int8 product, in place."""
        if self.dtype == FP8:
            return w8a8.torch_linear(self.x, self.weight, BF16)
        assert self.weight.bias is not None
        product = torch._int_mm(self.x.codes, self.weight.codes.t())
        scaled = torch.mul(product, self.x.scale[:, None], out=product.view(torch.float32))
        return torch.addcmul(self.weight.bias, scaled, self.weight.scale, out=self.out)

    def in_passes(self) -> object:
        """What follows as our row kernels."""
        made = self.by_library()
        if self.then == "gated":
            return fused_rows.gated_residual_(self.residual, made, self.gate, FIRST)
        return fused_rows.gelu_codes(made, self.dtype) if self.then == "gelu" else made

    def alone(self, fast: bool = False) -> Tensor:
        if self.dtype == INT8:
            return torch._int_mm(self.x.codes, self.weight.codes.t())
        given = self.x.codes, self.weight.codes.t(), self.x.scale[:, None], self.weight.scale
        return torch._scaled_mm(*given, bias=self.weight.bias, out_dtype=BF16, use_fast_accum=fast)

    def off(self, made: Tensor) -> float:
        few = slice(0, 512)
        exact = PLAIN.linear(self.x.part(few), self.weight, torch.float32)
        return float((made[few].float() - exact).norm() / exact.norm())


def products(shape: Shape, rows: int) -> None:
    head(
        f"{shape.name}: [{rows}, {shape.depth}] x [{shape.columns}, {shape.depth}]",
        "TFLOP/s",
        "against the product alone",
        "against library and passes",
        "relative L2",
    )
    work = 2e-9 * rows * shape.columns * shape.depth
    make = Inputs(Sizes(rows, FIRST), CUDA, BF16)
    x, w = make.normal(rows, shape.depth), make.normal(shape.columns, shape.depth)
    row("bf16 cuBLAS, alone", work / median(lambda: F.linear(x, w)), "", "", "")
    for dtype in dtypes():
        product = Product(shape, rows, dtype)
        median(product.in_use, 60)  # until the clocks are what they stay at
        alone, passes, used = (median(call) for call in (product.alone, product.in_passes, product.in_use))
        library = "_int_mm" if dtype == INT8 else "_scaled_mm"
        row(f"{library}, alone", work / alone, 1.0, passes / alone, "")
        row(f"{library}, then passes", work / passes, alone / passes, 1.0, product.off(product.by_library()))
        if dtype == FP8:
            fast = median(partial(product.alone, True))
            row(
                f"{library}, fast accumulation",
                work / fast,
                alone / fast,
                passes / fast,
                product.off(product.alone(True)),
            )
        row(f"{NAMES[dtype]} as chosen for this card", work / used, alone / used, passes / used, "")
        for tile in tiles():
            run = partial(product.by_kernel, tile)
            name = f"{NAMES[dtype]} {tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"
            name += " (in use)" * (tile == tile_in_use(dtype))
            try:
                took = median(run)
            except Exception as error:  # noqa: BLE001
                row(name, type(error).__name__, str(error)[:80], "", "")
                continue
            row(name, work / took, alone / took, passes / took, "" if shape.then else product.off(product.out))


def blocks() -> None:
    """A double and a single block at 512x512x129, 300 text tokens, chunks of 4096; attention is left out."""
    config = TransformerConfig(double_blocks=1, single_blocks=1)
    settings = {"size": (512, 512), "frames": 129, "steps": 1, "text_tokens": 300}
    inputs = random_inputs(config, **settings, device=CUDA, dtype=BF16)
    tokens = len(inputs.rope[0])
    head(f"block without attention, {tokens} + 300 tokens", "double, ms", "single, ms", "20 and 40, s")
    kept = w8a8.LIBRARY
    for scheme in [NAMES[dtype] for dtype in dtypes()]:
        model = random_model(config)
        quantize_blocks(model, scheme)
        ways = [
            ("w8a16, plain torch", "w8a16", PLAIN, kept, 4096),
            ("w8a16, fused ops", "w8a16", FUSED, kept, 4096),
            ("w8a8, fused, as chosen for this card", "w8a8", FUSED, kept, 4096),
            ("the same, chunks of 2816", "w8a8", FUSED, kept, 2816),
            ("the same, chunks of 5632", "w8a8", FUSED, kept, 5632),
            ("w8a8, fused, all products ours", "w8a8", FUSED, set(), 4096),
        ]
        for name, compute, table, library, rows in ways:
            set_compute(model, compute)
            w8a8.LIBRARY = library
            work = Workspace(config, tokens, 300, Chunking(rows, HEADS), CUDA, BF16, table)
            double, single = block_times(model, work, inputs)
            row(f"{scheme} {name}", double, single, (20 * double + 40 * single) / 1e3)
        w8a8.LIBRARY = kept
    q, k, v = torch.randn(3, tokens + 300, HEADS, DIM, device=CUDA, dtype=BF16)
    row("torch's attention, alone", *2 * [took := median(lambda: sdpa(q, k, v))], 60 * took / 1e3)


def no_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    return q if out is None else out


def random_model(config: TransformerConfig) -> HunyuanVideoTransformer:
    with CUDA:
        model = HunyuanVideoTransformer(config, no_attention).to(BF16).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def block_times(model: HunyuanVideoTransformer, work: Workspace, inputs: StepInputs) -> tuple[float, float]:
    step = replace(inputs.steps[0], modulation=inputs.steps[0].modulation.float())
    first = len(inputs.rope[0]) // inputs.latents.shape[1]
    run = chunked.begin(work, model.img_in, inputs.latents, step.txt, first, inputs.rope, model.attend)
    blocks, double, single = list(model.blocks().values()), next(iter(step.double())), next(iter(step.single()))
    return (
        median(lambda: chunked.double_block(blocks[0], run, double), 100),
        median(lambda: chunked.single_block(blocks[1], run, single), 100),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", nargs="*", help="ops and tiles; used by this program itself")
    parser.add_argument("--quick", action="store_true", help="products of 4096 rows only")
    options = parser.parse_args()
    if options.compile is not None:
        for unit in options.compile:
            try:
                compile_one(unit)
            except Exception as error:  # noqa: BLE001
                print(f"{unit}: {type(error).__name__} {str(error)[:300]}", flush=True)
        return
    import triton

    start = time.perf_counter()
    print(f"{describe(CUDA)}, torch {torch.__version__}, Triton {triton.__version__}")
    compile_all()
    elementwise(34192)
    for shape in SHAPES:
        for rows in (4096,) if options.quick else (4096, 8192):
            products(shape, rows)
    blocks()
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
