"""Attention kernels on this card: accuracy in float32, then speed against torch's: `python tests/bench/attention.py`

Prints one table a part, compiles included, and stops trying further tiles when --seconds are over. Speeds count the two
products of exact attention (4 tokens^2 heads dim), quantization included in the time where the row says so. Each
reported tile is one of `kernels/attention_tiles.py`; the first of its list is the one that the backends use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lowvram_i2v.kernels import attention_dense, attention_int8, attention_quantize, attention_sparse  # noqa: E402
from lowvram_i2v.kernels import attention_reference as reference  # noqa: E402
from lowvram_i2v.kernels.attention_launch import card  # noqa: E402
from lowvram_i2v.kernels.attention_tiles import DENSE, INT8, Tile  # noqa: E402

HEADS, DIM = 24, 128
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)

    return attend


def dense(tile: Tile) -> Attend:
    return lambda q, k, v: attention_dense.attend(q, k, v, tile)


def int8(tile: Tile) -> Attend:
    return lambda q, k, v: attention_int8.attend_quantized(q, attention_quantize.quantize(k, v, tile), tile)


def sparse(tile: Tile, density: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = -(-len(k) // tile.keys)
        always = torch.arange(blocks, device=k.device) >= blocks - 7  # the text, and so the last block
        return attention_sparse.attend(q, k, v, tile, density, always)

    return attend


def peers() -> dict[str, Attend]:
    found = {
        "sdpa": sdpa(None),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    try:
        from sageattention import sageattn
    except ImportError:
        return found
    return found | {"sage": lambda q, k, v: sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]}


def ours(name: str) -> dict[str, Attend]:
    return {f"dense {tile}": dense(tile) for tile in DENSE[name]} | {f"int8 {tile}": int8(tile) for tile in INT8[name]}


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the device."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def cases(tokens: int, heads: int) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """bf16 inputs, K with an offset; a peaked row lives on some hundred of 34 000 keys, outliers are 6 times as big."""
    torch.manual_seed(1)
    q, k, v = torch.randn(3, tokens, heads, DIM, device="cuda").unbind()
    k_offset, v_offset = torch.randn(2, heads, DIM, device="cuda").unbind()
    plain = torch.ones(DIM, device="cuda")
    outlier = torch.where(torch.arange(DIM, device="cuda") == 7, 6.0, plain)
    for name, factor, channels, offset in (
        ("flat", 0.2, plain, 0.0),
        ("flat, V offset", 0.2, plain, 1.0),
        ("peaked", 2.0, plain, 0.0),
        ("peaked, V offset", 2.0, plain, 1.0),
        ("peaked, V offset, outlier in q and k", 1.0, outlier, 1.0),
    ):
        given = (q * factor * channels, (k + k_offset) * channels, v + offset * v_offset)
        yield name, tuple(x.bfloat16() for x in given)  # type: ignore[misc]


def accuracy(kernels: dict[str, Attend], tokens: int, over: Callable[[], bool]) -> None:
    heads, rows = 4, slice(0, None, max(1, tokens // 256))
    given = dict(cases(tokens, heads))
    exact = {name: reference.attention(*inputs, rows=rows) for name, inputs in given.items()}
    print(f"\nRelative L2 error against float32, {tokens} tokens\n")
    print(f"| kernel | {' | '.join(given)} |\n|---|{'---|' * len(given)}")
    for kernel, attend in kernels.items():
        if over():
            print(f"| {kernel} | no time left |")
            continue
        errors = []
        for name, inputs in given.items():
            try:
                errors.append(f"{reference.relative_l2(attend(*inputs)[rows], exact[name]):.5f}")
            except Exception as error:  # noqa: BLE001
                errors.append(f"{type(error).__name__}: {str(error).strip()[-80:]}".replace("\n", " "))
                break
        print(f"| {kernel} | {' | '.join(errors)} |", flush=True)


def speed(kernels: dict[str, Attend], tokens: int, repeats: int, over: Callable[[], bool]) -> dict[str, float]:
    q, k, v = torch.randn(3, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16).unbind()
    work = 4 * tokens**2 * HEADS * DIM
    times: dict[str, float] = {}
    print(f"\n{tokens} tokens, {HEADS} heads x {DIM}\n")
    print("| kernel | ms | TFLOP/s | x flash | x cudnn |\n|---|---|---|---|---|")
    for kernel, attend in kernels.items():
        if over():
            continue
        try:
            times[kernel] = seconds(lambda attend=attend: attend(q, k, v), repeats)  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001
            print(f"| {kernel} | {type(error).__name__} {str(error).strip()[-80:]!r} |")
            continue
        ratios = [
            f"{times[peer] / times[kernel]:.2f}" if peer in times else "" for peer in ("sdpa flash", "sdpa cudnn")
        ]
        print(
            f"| {kernel} | {times[kernel] * 1e3:.2f} | {work / times[kernel] / 1e12:.0f} | {' | '.join(ratios)} |",
            flush=True,
        )
    tile = INT8[card(q.device)][0]
    if not over():
        time_sparse = seconds(lambda: sparse(tile, 0.2)(q, k, v), repeats)
        print(f"| sparse {tile}, 20 % of blocks | {time_sparse * 1e3:.2f} | {work / time_sparse / 1e12:.0f} | | |")
    if (name := f"int8 {tile}") in times:
        prologue = seconds(lambda: attention_quantize.quantize(k, v, tile), 5)
        print(f"\nquantization {prologue * 1e3:.3f} ms, {prologue / times[name]:.1%} of {name}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[34192, 119200])
    parser.add_argument("--seconds", type=float, default=100)
    options = parser.parse_args()
    start = time.monotonic()
    name = card(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, tiles of {name}")

    def over() -> bool:
        return time.monotonic() - start > options.seconds

    kernels = peers() | ours(name)
    with torch.inference_mode():
        accuracy(kernels, options.tokens[0], over)
        times = speed(kernels, options.tokens[0], 7, over)
        for tokens in options.tokens[1:]:
            best = [min((x for x in times if x.startswith(kind)), key=times.__getitem__) for kind in ("dense", "int8")]
            kept = {x: kernels[x] for x in (*peers(), *best) if x in times and x != "sdpa"}
            speed(kept, tokens, 3, over)
    print(f"\n{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
