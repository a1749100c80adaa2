"""Block-sparse attention on this card: `python tests/bench/sparse.py [--tokens 119200] [--density 0.2 0.1]`

For each tile of this card: dense 8-bit attention, sparse attention at each density (quantization and lists included),
and the parts of one sparse call. Inputs turn slowly along the sequence, as a video in bricks does; with them the error
against dense float32 of chosen blocks, beside that of dense 8-bit attention and of as many random blocks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.attention import seconds  # noqa: E402

from lowvram_i2v.kernels import attention_int8, attention_quantize, attention_reference, attention_sparse  # noqa: E402
from lowvram_i2v.kernels.attention_cut import Cut, cut_sequence  # noqa: E402
from lowvram_i2v.kernels.attention_launch import card  # noqa: E402
from lowvram_i2v.kernels.attention_quantize import Quantized  # noqa: E402
from lowvram_i2v.kernels.attention_route import Route, block_means, on_every_list  # noqa: E402
from lowvram_i2v.kernels.attention_tiles import INT8, Tile  # noqa: E402

HEADS, DIM, TEXT, FRAMES = 24, 128, 400, 33
Triple = tuple[Tensor, Tensor, Tensor]


def milliseconds(call: Callable[[], object]) -> float:
    return 1e3 * seconds(call, 5)


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


def parts(given: Triple, tile: Tile, cut: Cut) -> dict[str, Callable[[], object]]:
    q, k, v = given
    centres = attention_quantize.statistics(k, v)
    key_means, value_means = block_means(k, tile.keys), block_means(v, tile.keys)
    means = attention_quantize.encode(key_means, value_means, tile, centres)
    kv, chosen = attention_quantize.encode(k, v, tile, centres), attention_sparse.route(q, key_means, cut, tile)
    return {
        "statistics of K and V": lambda: attention_quantize.statistics(k, v),
        "means of blocks": lambda: (block_means(k, tile.keys), block_means(v, tile.keys)),
        "codes": lambda: attention_quantize.encode(k, v, tile, centres),
        "lists": lambda: attention_sparse.route(q, key_means, cut, tile),
        "attention": lambda: attention_sparse.attend_routed(q, kv, means, chosen, cut, tile),
    }


def at_random(given: Triple, tile: Tile, cut: Cut) -> Tensor:
    """Sparse attention with lists of as many blocks that do not look at q and k."""
    q, k, v = given
    centres = attention_quantize.statistics(k, v)
    kv: Quantized = attention_quantize.encode(k, v, tile, centres)
    means = attention_quantize.encode(block_means(k, tile.keys), block_means(v, tile.keys), tile, centres)
    scores = torch.rand(q.shape[1], cut.query_blocks, cut.key_blocks, device="cuda")
    scores.masked_fill_(on_every_list(cut, q.device), 2.0)
    blocks = scores.topk(cut.kept, -1).indices.sort(-1).values
    skipped = torch.zeros(*scores.shape[:2], means.k.shape[1], dtype=torch.uint8, device="cuda")
    skipped[..., : cut.key_blocks] = 1
    chosen = Route(blocks.int(), skipped.scatter_(2, blocks, 0))
    return attention_sparse.attend_routed(q, kv, means, chosen, cut, tile)


def speed(tokens: int, densities: list[float], tiles: tuple[Tile, ...]) -> None:
    given = inputs(tokens, HEADS)
    print(f"\n{tokens} tokens, {HEADS} heads x {DIM}\n")
    print(f"| tile | dense ms | {' | '.join(f'{d:.0%} ms | x dense' for d in densities)} |")
    print(f"|---|---|{'---|---|' * len(densities)}")
    for tile in tiles:
        try:
            whole = milliseconds(partial(dense, *given, tile))
            row = []
            for density in densities:
                time = milliseconds(partial(attention_sparse.attend, *given, tile, cut_of(tokens, tile, density)))
                row.append(f"{time:.2f} | {whole / time:.2f}")
        except Exception as error:  # noqa: BLE001
            print(f"| {tile} | {type(error).__name__} {str(error).strip()[-80:]!r} |")
            continue
        print(f"| {tile} | {whole:.2f} | {' | '.join(row)} |", flush=True)
    cut = cut_of(tokens, tiles[0], densities[0])
    times = {name: milliseconds(call) for name, call in parts(given, tiles[0], cut).items()}
    print(f"\n{tiles[0]}, {cut}: " + ", ".join(f"{name} {time:.2f} ms" for name, time in times.items()), flush=True)


def accuracy(tokens: int, densities: list[float], tile: Tile) -> None:
    given, rows = inputs(tokens, 2), slice(0, None, max(1, tokens // 512))
    exact = attention_reference.attention(*given, rows=rows)
    print(f"\nRelative L2 against float32, {tokens} tokens, {tile}: dense ", end="")
    print(f"{attention_reference.relative_l2(dense(*given, tile)[rows], exact):.4f}", end="")
    for density in densities:
        cut = cut_of(tokens, tile, density)
        found = attention_reference.relative_l2(attention_sparse.attend(*given, tile, cut)[rows], exact)
        blind = attention_reference.relative_l2(at_random(given, tile, cut)[rows], exact)
        print(f"; {density:.0%} of blocks {found:.4f}, random blocks {blind:.4f}", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[34192, 119200])
    parser.add_argument("--density", type=float, nargs="*", default=[0.2, 0.1, 1.0])
    options = parser.parse_args()
    tiles = INT8[card(torch.device("cuda"))]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.inference_mode():
        accuracy(options.tokens[0], options.density, tiles[0])
        for tokens in options.tokens:
            speed(tokens, options.density, tiles)


if __name__ == "__main__":
    main()
