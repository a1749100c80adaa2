"""Block-sparse attention on this card: `python tests/bench/sparse.py [--tokens 34192 119200] [--density 0.2 0.1]`

For each tile: dense 8-bit attention and sparse attention at each density, quantization and lists included. Then what
every kernel of one call takes, how long the host needs to start them all, and the kernels that differ by more than 3 %
with other constants. Inputs turn slowly along the sequence, as a video in bricks does; with them the error against
dense float32 of chosen blocks, beside that of dense 8-bit attention and of as many random blocks.

About 25 s: every variant is compiled first, in a process of its own, and left out if it fails or hangs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.attention import queued_seconds, seconds  # noqa: E402

from lowvram_i2v.kernels import attention_int8, attention_lists, attention_quantize, attention_sparse  # noqa: E402
from lowvram_i2v.kernels.attention_cut import Cut, cut_sequence  # noqa: E402
from lowvram_i2v.kernels.attention_launch import card  # noqa: E402
from lowvram_i2v.kernels.attention_lists import Lists, mean_blocks  # noqa: E402
from lowvram_i2v.kernels.attention_quantize import Pass  # noqa: E402
from lowvram_i2v.kernels.attention_reference import attention, relative_l2  # noqa: E402
from lowvram_i2v.kernels.attention_route import on_every_list  # noqa: E402
from lowvram_i2v.kernels.attention_tiles import INT8, Tile  # noqa: E402

HEADS, DIM, TEXT, FRAMES = 24, 128, 400, 33
REPEATS = 5
PATIENCE = 60
"""Seconds after which a variant that is being compiled hangs."""
LISTS, KERNEL = attention_lists, attention_sparse
VARIANTS: dict[str, list[tuple[ModuleType, str, object]]] = {
    "as they are": [],
    "means: 16 tokens": [(LISTS, "PIECE", 16)],
    "means: 4 warps, 16 tokens": [(LISTS, "MEANS_WARPS", 4), (LISTS, "PIECE", 16)],
    "means: 4 warps": [(LISTS, "MEANS_WARPS", 4)],
    "codes and means of K: 8 warps": [(KERNEL, "WITH_MEANS", Pass(8, 8, 3))],
    "codes and means of K: 8 warps, 4 tiles": [(KERNEL, "WITH_MEANS", Pass(4, 8, 3))],
    "codes and means of K: 4 tiles": [(KERNEL, "WITH_MEANS", Pass(4, 4, 3))],
    "codes and means of K: 2 stages": [(KERNEL, "WITH_MEANS", Pass(8, 4, 2))],
    "codes and means of K: 4 stages": [(KERNEL, "WITH_MEANS", Pass(8, 4, 4))],
    "scores: 32 x 32": [(LISTS, "SIDE", 32)],
    "mean tiles: 2 stages": [(KERNEL, "MEAN_STAGES", 2)],
    "mean tiles: 4 stages": [(KERNEL, "MEAN_STAGES", 4)],
    "codes of means: as all codes": [(KERNEL, "OF_MEANS", attention_quantize.PASSES)],
}
"""Name -> other constants of our modules."""
Triple = tuple[Tensor, Tensor, Tensor]


def tiles(name: str) -> list[Tile]:
    """Those of the card with 8-bit values, the one in use first."""
    return [tile for tile in INT8[name] if tile.pv == INT8[name][0].pv]


def inputs(tokens: int, heads: int) -> Triple:
    """bf16; q and k of neighbours are alike, so a row looks mainly at some hundred tokens around it."""
    generator = torch.Generator("cuda").manual_seed(1)
    rate = torch.rand(heads, DIM // 2, device="cuda", generator=generator)
    angle = torch.linspace(0, 300, tokens, device="cuda")[:, None, None] * rate
    slow = torch.cat([angle.cos(), angle.sin()], -1)

    def made(size: float, noise: float) -> Tensor:
        x = torch.randn(tokens, heads, DIM, device="cuda", generator=generator).mul_(noise)
        return x.add_(slow, alpha=size).bfloat16()

    return made(1.5, 0.3), made(1.5, 0.3), made(1.0, 0.5)


def cut_of(tokens: int, tile: Tile, density: float) -> Cut:
    image = tokens - TEXT
    return cut_sequence(tokens, image // FRAMES, image, density, tile.rows, tile.keys)


def dense(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> Tensor:
    return attention_int8.attend_quantized(q, attention_quantize.quantize(k, v, tile), tile)


def at_random(given: Triple, tile: Tile, cut: Cut) -> Tensor:
    """Sparse attention with lists of as many blocks that do not look at q and k."""
    q, k, v = given
    _, v_means, centres = mean_blocks(q, k, v, cut)
    k_means = torch.empty_like(v_means)
    keys = attention_quantize.encode_keys(k, tile, centres, means=k_means)
    codes = attention_sparse.encode_means(k_means, v_means, cut, tile, centres)
    scores = torch.rand(q.shape[1], cut.query_blocks, cut.key_blocks, device="cuda")
    scores.masked_fill_(on_every_list(cut, q.device), 2.0)
    blocks = scores.topk(cut.kept, -1).indices.sort(-1).values
    seen = torch.ones(scores.shape, dtype=torch.int64, device="cuda").scatter_(2, blocks, 0)
    skipped = torch.zeros(*scores.shape[:2], codes.k.shape[1], dtype=torch.int64, device="cuda")
    skipped[..., : len(cut.means)] = seen[..., cut.means.start : cut.means.stop]
    bits = skipped.unflatten(-1, (-1, 32)) << torch.arange(32, device="cuda")
    chosen = Lists(blocks.int(), bits.sum(-1).int())
    kv = attention_quantize.Quantized(*keys, *attention_quantize.encode_values(v, tile, centres), len(k))
    return attention_sparse.attend_routed(q, kv, codes, chosen, cut, tile)


def speed(given: Triple, densities: list[float], tiles: list[Tile]) -> None:
    tokens = len(given[0])
    print(f"\n{tokens} tokens, {HEADS} heads x {DIM}\n")
    print(f"| tile | dense ms | {' | '.join(f'{d:.0%} ms | x dense' for d in densities)} |")
    print(f"|---|---|{'---|---|' * len(densities)}")
    for tile in tiles:
        whole = 1e3 * queued_seconds(partial(dense, *given, tile), REPEATS)
        row = []
        for density in densities:
            call = partial(attention_sparse.attend, *given, tile, cut_of(tokens, tile, density))
            took = 1e3 * queued_seconds(call, REPEATS)
            row.append(f"{took:.2f} | {whole / took:.2f}")
        print(f"| {tile} | {whole:.2f} | {' | '.join(row)} |", flush=True)


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Kernel -> milliseconds of one call, in the order in which they first ran."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    events = found.key_averages()
    return {x.key: x.self_device_time_total / REPEATS / 1e3 for x in events if x.self_device_time_total > 0}


def shares(name: str, call: Callable[[], object]) -> None:
    """Every kernel, their sum, one call with an idle device before it, calls in a row, and what the host needs."""
    found = kernel_times(call)
    alone = 1e3 * seconds(call, REPEATS)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    host = 1e3 * (time.perf_counter() - began) / REPEATS
    end.synchronize()
    print(f"\n{name}: " + ", ".join(f"{key[:40]} {took:.3f}" for key, took in found.items()))
    print(
        f"  ms; sum {sum(found.values()):.3f}, one call {alone:.3f}, in a row {start.elapsed_time(end) / REPEATS:.3f}, "
    )
    print(f"  host {host:.3f}", flush=True)


@contextmanager
def constants(changed: list[tuple[ModuleType, str, object]]) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def details(given: Triple, tile: Tile, density: float, variants: list[str]) -> None:
    tokens = len(given[0])
    cut = cut_of(tokens, tile, density)
    shares(f"dense {tile}", partial(dense, *given, tile))
    shares(f"sparse {cut}", partial(attention_sparse.attend, *given, tile, cut))
    plain = replace(cut, text_from=cut.query_blocks)
    shares("sparse, text as the others", partial(attention_sparse.attend, *given, tile, plain))
    usual = kernel_times(partial(attention_sparse.attend, *given, tile, cut))
    for name in variants:
        with constants(VARIANTS[name]):
            found = kernel_times(partial(attention_sparse.attend, *given, tile, cut))
        changed = {key: took for key, took in found.items() if abs(took / usual.get(key, took) - 1) > 0.03}
        print(f"{name}: sum {sum(found.values()):.3f}; " + ", ".join(f"{k[:40]} {t:.3f}" for k, t in changed.items()))


def accuracy(tokens: int, densities: list[float], tile: Tile) -> None:
    given, rows = inputs(tokens, 2), slice(0, None, max(1, tokens // 512))
    exact = attention(*given, rows=rows)
    print(f"\nRelative L2 against float32, {tokens} tokens, {tile}: dense ", end="")
    print(f"{relative_l2(dense(*given, tile)[rows], exact):.4f}", end="")
    for density in densities:
        cut = cut_of(tokens, tile, density)
        found = relative_l2(attention_sparse.attend(*given, tile, cut)[rows], exact)
        blind = relative_l2(at_random(given, tile, cut)[rows], exact)
        print(f"; {density:.0%} of blocks {found:.4f}, random blocks {blind:.4f}", end="")
    print()


def compile_one(name: str, tokens: list[int]) -> None:
    """Runs a tile, dense and sparse, or the first one with other constants."""
    known = {str(tile): tile for tile in tiles(card(torch.device("cuda")))}
    first = next(iter(known.values()))
    for count in tokens:
        given = inputs(count, 2)
        if name in known:
            dense(*given, known[name])
            attention_sparse.attend(*given, known[name], cut_of(count, known[name], 0.2))
        else:
            with constants(VARIANTS[name]):
                attention_sparse.attend(*given, first, cut_of(count, first, 0.2))
    torch.cuda.synchronize()


def compiled(names: list[str], tokens: list[int]) -> list[str]:
    """Those that compile and run in a process of their own; Triton keeps their code."""
    start, good = time.monotonic(), []
    command = [sys.executable, __file__, "--tokens", *map(str, tokens), "--compile"]
    running = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in names
    }
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, start + PATIENCE - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"still running after {PATIENCE} s"
        if process.returncode == 0:
            good.append(name)
        else:
            print(f"{name} is left out: {said.strip()[-300:]}", flush=True)
    print(f"{len(good)} variants compiled in {time.monotonic() - start:.0f} s", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[34192, 119200])
    parser.add_argument("--density", type=float, nargs="*", default=[0.2, 0.1])
    parser.add_argument("--compile", help="one variant; used by this program itself")
    options = parser.parse_args()
    if options.compile:
        with torch.inference_mode():
            compile_one(options.compile, options.tokens)
        return
    known = tiles(card(torch.device("cuda")))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    good = compiled([*map(str, known), *VARIANTS], options.tokens)
    with torch.inference_mode():
        accuracy(options.tokens[0], options.density, known[0])
        for tokens in options.tokens:
            given = inputs(tokens, HEADS)
            speed(given, options.density, [tile for tile in known if str(tile) in good])
            details(given, known[0], options.density[0], [name for name in VARIANTS if name in good])


if __name__ == "__main__":
    main()
