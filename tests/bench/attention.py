"""Attention kernels on this card: accuracy in float32, then speed against torch's: `python tests/bench/attention.py`

Every kernel is first compiled and tried on a few tokens in a process of its own, one for each core; those that fail or
hang are left out. Then come two tables for each number of tokens. Speeds count the two products of exact attention
(4 tokens^2 heads dim); the time of 8-bit kernels includes quantization. Tiles are those of `attention_tiles.py`; the
first of a list is the one that the backends use. About 40 s on an H100; nothing new is begun after --seconds.

`--only quantization` times the passes over K and V one by one, in several cuts, as a share of 8-bit attention's time,
and holds what each gave in the end against its definition (exit status 1 if it is something else);
`--only accuracy --kernel int8` prints those rows of the first table alone. About 25 s each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lowvram_i2v.kernels import attention_dense, attention_int8, attention_quantize, attention_sparse  # noqa: E402
from lowvram_i2v.kernels import attention_reference as reference  # noqa: E402
from lowvram_i2v.kernels.attention_cut import cut_sequence  # noqa: E402
from lowvram_i2v.kernels.attention_launch import card  # noqa: E402
from lowvram_i2v.kernels.attention_quantize import PASSES, Centres, Pass, Passes  # noqa: E402
from lowvram_i2v.kernels.attention_tiles import DENSE, INT8, Tile  # noqa: E402

HEADS, DIM = 24, 128
PATIENCE = 60
"""Seconds after which a kernel on a few tokens hangs."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CUTS = {
    "statistics": ((16, 4, 1), (8, 4, 1), (16, 4, 2), (16, 2, 1), (8, 2, 1), (4, 2, 1)),
    "keys": ((8, 4, 2), (4, 4, 2), (16, 4, 2), (8, 4, 1), (8, 4, 3), (8, 8, 2)),
    "values": ((4, 4, 1), (2, 4, 1), (8, 4, 1), (4, 8, 1), (2, 8, 1), (8, 8, 1), (4, 4, 2)),
}
"""Passes of quantization that are tried: tiles of a program, warps, stages."""
AHEAD, QUEUED = 20_000_000, 20
"""Cycles for which the device is kept busy while QUEUED calls are queued."""


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


def int8(tile: Tile, how: Passes = PASSES) -> Attend:
    return lambda q, k, v: attention_int8.attend_quantized(q, attention_quantize.quantize(k, v, tile, how=how), tile)


def cuts(tile: Tile) -> dict[str, Passes]:
    """Every cut of CUTS by name, the other two passes as they are in use."""
    return {
        f"{part} {Pass(*numbers)}": replace(PASSES, **{part: Pass(*numbers)})
        for part, tried in CUTS.items()
        for numbers in dict.fromkeys((tuple(vars(getattr(PASSES, part)).values()), *tried))
    }


def sparse(tile: Tile, density: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        image = len(k) - 400
        cut = cut_sequence(len(k), image // 33, image, density, tile.rows, tile.keys)
        return attention_sparse.attend(q, k, v, tile, cut)

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

    def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = sageattn(q[None], k[None].clone(), v[None], tensor_layout="NHD")  # it changes k in place
        return result[0]

    return found | {"sage": sage}


def ours(name: str) -> dict[str, Attend]:
    found = {f"dense {tile}": dense(tile) for tile in DENSE[name]} | {f"int8 {tile}": int8(tile) for tile in INT8[name]}
    found |= {cut: int8(INT8[name][0], how) for cut, how in cuts(INT8[name][0]).items()}
    return found | {f"sparse, 20 % of blocks, {INT8[name][0]}": sparse(INT8[name][0], 0.2)}


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


def queued_seconds(call: Callable[[], object], calls: int = QUEUED) -> float:
    """Time of a call on the device when it never waits for the host, as inside a model; median of 3."""
    call()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def cases(tokens: int, heads: int) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """bf16 inputs, K with an offset; a peaked row lives on some hundred of 34 000 keys, outliers are 6 times as big:
    each in a channel of its own, or both in one, which makes many rows live on a few keys."""
    torch.manual_seed(1)
    q, k, v = torch.randn(3, tokens, heads, DIM, device="cuda").unbind()
    k_offset, v_offset = torch.randn(2, heads, DIM, device="cuda").unbind()
    plain = torch.ones(DIM, device="cuda")
    one, another = (torch.where(torch.arange(DIM, device="cuda") == channel, 6.0, plain) for channel in (7, 9))
    for name, factor, of_q, of_k, offset in (
        ("flat", 0.2, plain, plain, 0.0),
        ("flat, V offset", 0.2, plain, plain, 1.0),
        ("peaked", 2.0, plain, plain, 0.0),
        ("peaked, V offset", 2.0, plain, plain, 1.0),
        ("V offset, outliers in q and k", 1.0, one, another, 1.0),
        ("the same, peaked", 2.0, one, another, 1.0),
        ("V offset, outliers in one channel", 1.0, one, one, 1.0),
    ):
        given = (q * factor * of_q, (k + k_offset) * of_k, v + offset * v_offset)
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


def speed(kernels: dict[str, Attend], tokens: int, repeats: int, over: Callable[[], bool]) -> None:
    q, k, v = torch.randn(3, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16).unbind()
    work = 4 * tokens**2 * HEADS * DIM
    times: dict[str, float] = {}
    print(f"\n{tokens} tokens, {HEADS} heads x {DIM}\n")
    print("| kernel | ms | TFLOP/s | x flash | x cudnn |\n|---|---|---|---|---|")
    for kernel, attend in kernels.items():
        if over():
            print(f"| {kernel} | no time left |")
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
    if (name := f"int8 {tile}") in times and not over():
        prologue(k, v, tile, times[name])


def prologue(k: Tensor, v: Tensor, tile: Tile, whole: float) -> None:
    """What quantization takes beside a copy, alone and without waiting for the host."""
    moved = 4 * k.nbytes + k.nbytes // attention_quantize.SAMPLED  # K and V to codes, V once more for its statistics
    copied = queued_seconds(lambda: k.clone())
    alone = seconds(lambda: attention_quantize.quantize(k, v, tile), 7)
    took = queued_seconds(lambda: attention_quantize.quantize(k, v, tile))
    print(f"copy of K: {copied * 1e3:.3f} ms, {2 * k.nbytes / copied / 1e9:.0f} GB/s")
    print(f"quantization: {took * 1e3:.3f} ms, {moved / took / 1e9:.0f} GB/s, {took / whole:.2%} of int8 {tile}")
    print(f"called alone, with the host's part: {alone * 1e3:.3f} ms, {alone / whole:.2%}")


def share_wrong(part: str, made: tuple[Tensor, ...], k: Tensor, v: Tensor, tile: Tile, centres: Centres) -> float:
    """Of what a pass made for the first and the last head, the share that is not what the definition gives."""
    heads = slice(None, None, HEADS - 1)
    k, v, (k_centre, v_centre, _) = k[:, heads], v[:, heads], (x[heads] for x in centres)
    got = [x[heads] for x in made]
    if part == "keys":
        codes, scales = reference.quantize_keys(k, k_centre, tile.keys)
        near = torch.isclose(got[1][:, : scales.shape[1]], scales, rtol=1e-4)
        return max(share(got[0][:, : codes.shape[1]] != codes), share(~near))
    if part == "values":
        eight = tile.pv.startswith("fp8")
        codes = reference.quantize_values(v, v_centre, got[1], got[0].shape[2 if eight else 1], eight).float()
        shifted = v_centre - codes.sum(2 if eight else 1) / len(v) * got[1]
        rtol, atol = (0.0, 0.0) if eight else (2e-3, 1e-5)  # sums are rounded elsewhere: of 8 bits few fall otherwise
        near = torch.isclose(got[0].float(), codes, rtol=rtol, atol=atol)
        return max(share(~near), share(~torch.isclose(got[2], shifted, atol=1e-4)))
    mean = v.float().mean(0)
    sampled = reference.sampled_tokens(len(k), attention_quantize.SAMPLED, attention_quantize.TURN)
    right = (k[sampled.to(k.device)].float().mean(0), mean, (v.float() - mean).abs().amax(0))
    return max(share(~torch.isclose(x, y, atol=1e-4)) for x, y in zip(got, right, strict=True))


def share(wrong: Tensor) -> float:
    return float(wrong.float().mean())


def quantization(tokens: int, names: list[str]) -> int:
    """The passes one by one, in every cut; how many of them give something else than the definition."""
    k, v = torch.randn(2, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16).unbind()
    tile = INT8[card(k.device)][0]
    whole = seconds(lambda: int8(tile)(k, k, v), 7)
    print(f"\n{tokens} tokens, {HEADS} heads x {DIM}; int8 {tile}: {whole * 1e3:.2f} ms")
    prologue(k, v, tile, whole)
    centres, failed = attention_quantize.statistics(k, v), 0
    for name, how in cuts(tile).items():
        if name not in names:
            continue
        part = name.split()[0]
        moved, call = {
            "statistics": (
                v.nbytes + k.nbytes // attention_quantize.SAMPLED,
                lambda how=how: attention_quantize.statistics(k, v, how.statistics),
            ),
            "keys": (
                k.nbytes + k.nbytes // 2,
                lambda how=how: attention_quantize.encode_keys(k, tile, centres, how.keys),
            ),
            "values": (
                v.nbytes + v.nbytes // 2,
                lambda how=how: attention_quantize.encode_values(v, tile, centres, how.values),
            ),
        }[part]
        took = queued_seconds(call)
        off = max(share_wrong(part, call(), k, v, tile, centres) for _ in range(3))
        failed += not off < 1e-3
        said = f"{off:.1e} of it differs{'' if off < 1e-3 else ', WRONG'}"
        print(f"{name}: {took * 1e3:.4f} ms, {moved / took / 1e9:.0f} GB/s, {took / whole:.2%}, {said}", flush=True)
    return failed


def compile_all(names: list[str]) -> list[str]:
    """Runs every kernel on a few tokens, each in its own process, so that its code is in Triton's cache; those that
    failed, gave a wrong result or did not come back are left out."""
    start, waiting, running, good = time.monotonic(), names[::-1], {}, []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 2):
            command = [sys.executable, __file__, "--compile", waiting[-1]]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            running[waiting.pop()] = (process, time.monotonic())
        for name, (process, began) in list(running.items()):
            if process.poll() is None and time.monotonic() - began < PATIENCE:
                continue
            process.kill()
            said = process.communicate()[0]
            del running[name]
            if process.returncode == 0:
                good.append(name)
            else:
                why = f"still running after {PATIENCE} s" if process.returncode < 0 else said.strip()[-300:]
                print(f"{name} is left out: {why}", flush=True)
        time.sleep(0.05)
    print(f"{len(good)} kernels compiled in {time.monotonic() - start:.0f} s", flush=True)
    return [name for name in names if name in good]


def compile_one(name: str) -> None:
    """Runs a kernel on a few tokens; raises ValueError if the result is wrong."""
    attend = ours(card(torch.device("cuda")))[name]
    inputs = dict(cases(3000, HEADS))["flat, V offset"]
    error = reference.relative_l2(attend(*inputs), reference.attention(*inputs))
    if not error < 0.05:
        raise ValueError(f"relative error {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[34192, 119200])
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--only", choices=("accuracy", "speed", "quantization"))
    parser.add_argument("--kernel", default="", help="a word in the names of the kernels to try")
    parser.add_argument("--compile", help="one kernel; used by this program itself")
    options = parser.parse_args()
    if options.compile:
        with torch.inference_mode():
            compile_one(options.compile)
        return
    start = time.monotonic()
    name = card(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, tiles of {name}")

    def over() -> bool:
        return time.monotonic() - start > options.seconds

    found, tried, failed = ours(name), list(cuts(INT8[name][0])), 0
    if options.only == "quantization":
        names = compile_all(tried)
        with torch.inference_mode():
            for tokens in options.tokens:
                failed += quantization(tokens, names)
    else:
        names = compile_all([kernel for kernel in found if kernel not in tried and options.kernel in kernel])
        kernels = {kernel: attend for kernel, attend in peers().items() if options.kernel in kernel}
        kernels |= {kernel: found[kernel] for kernel in names}
        with torch.inference_mode():
            for repeats, tokens in zip((7, *[2] * len(options.tokens)), options.tokens, strict=False):
                if options.only != "speed":
                    accuracy(kernels, tokens, over)
                if options.only != "accuracy":
                    speed(kernels, tokens, repeats, over)
    print(f"\n{time.monotonic() - start:.0f} s in all")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
