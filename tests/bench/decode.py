"""Decoding in one process, random weights of full width: `python tests/bench/decode.py [--sizes 1280x720 ...]`.

For each size and policy a Markdown row: seconds, peaks of device memory (allocated, reserved, predicted) and of host
memory, and the floor: the convolutions at the rate measured here, plus the attention. A run before warms up: the whole
clip, or, where tiles are decoded, the tiles of the first time.

With --profile, also where the host's time went, seconds of each segment, and the attention of one frame by itself.
With --kernels, the kernels that took longest, of the run that warms up.
With --diffusers, nothing but its two tilings, for the first size: a few frames to warm up, then one run, which ends
after --limit seconds with the share of tiles that it had decoded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import sys
import threading
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from lowvram_i2v.device import describe, pick_device  # noqa: E402
from lowvram_i2v.vae import engine as engine_module  # noqa: E402
from lowvram_i2v.vae import frames as frames_module  # noqa: E402
from lowvram_i2v.vae import planning as planning_module  # noqa: E402
from lowvram_i2v.vae.attention import by_products, fused, trusted_attention  # noqa: E402
from lowvram_i2v.vae.config import VaeConfig  # noqa: E402
from lowvram_i2v.vae.convolution import convolved, trusted_convolution  # noqa: E402
from lowvram_i2v.vae.decoder import VaeDecoder  # noqa: E402
from lowvram_i2v.vae.encoder import VaeEncoder  # noqa: E402
from lowvram_i2v.vae.engine import Engine, decode_frames  # noqa: E402
from lowvram_i2v.vae.image_encoder import ImageEncoder  # noqa: E402
from lowvram_i2v.vae.landing import Landing  # noqa: E402
from lowvram_i2v.vae.layout import attention_layout  # noqa: E402
from lowvram_i2v.vae.planning import Step, decode_bytes, encode_bytes, host_bytes  # noqa: E402
from lowvram_i2v.vae.policy import POLICIES, DecodeChunking, Policy  # noqa: E402
from lowvram_i2v.vae.route import Shape, Stage, stages  # noqa: E402
from lowvram_i2v.vae.streamed import Room  # noqa: E402

GIB = 2**30
ATTENTION_RATE = 84e12  # of one head of dimension 512 in SDPA on an H100
WATCHED = (
    (Engine, "__init__", "making the engine ready"),
    (engine_module, "tile_chunking", "planning what a tile may take"),
    (engine_module, "plan_route", "planning routes"),
    (frames_module.Memory, "fit", "asking for memory"),
    (frames_module.HostPiece, "memory", "waiting for locked memory"),
    (frames_module.HostPiece, "_lock", "a thread: making memory and locking it"),
    (Engine, "run", "giving the device its work"),
    (frames_module.Courier, "settle", "waiting for the device and its copies"),
    (Landing, "finished", "waiting for the device and the last parts of tiles"),
    (frames_module.HostPiece, "_give_back", "a thread: unlocking memory and freeing it"),
    (frames_module.HostPiece, "close", "waiting for that"),
)


def rss() -> int:
    """Resident bytes of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakRss:
    """The most resident memory while a `with` lasts, looked at 20 times a second."""

    def __enter__(self) -> PeakRss:
        self.peak, self._ended = rss(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, rss())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def random_module(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """float16 weights that keep values near one."""
    module = module.to_empty(device=device).to(torch.float16).requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.02)
    return module


def flops(stage: Stage, before: Shape) -> float:
    """Of one stage on the whole clip, upsamplings as phases."""
    after = stage.shape(before)
    if stage.kind == "attend":
        frame = before.height * before.width
        return 4 * stage.inputs * frame * frame * before.frames * (before.frames + 1) / 2
    taps = 27 if stage.kind != "up" else (8 if stage.time > 1 else 12)
    work = 2.0 * taps * stage.inputs * stage.outputs * after.positions
    return work + (2.0 * stage.inputs * stage.outputs * after.positions if stage.narrows else 0)


def floor_seconds(config: VaeConfig, latent: Shape, rate: float) -> float:
    """Each convolution of the untiled decoder once, and the attention."""
    total, shape = 0.0, latent
    for stage in stages(config):
        total += flops(stage, shape) / (ATTENTION_RATE if stage.kind == "attend" else rate)
        shape = stage.shape(shape)
    return total


def convolution_rate(device: torch.device) -> float:
    """Operations a second of a 128-channel convolution of 10 frames of 272x272."""
    x = torch.randn(10, 272, 272, 128, device=device, dtype=torch.float16)
    weight = torch.randn(128, 128, 3, 3, 3, device=device, dtype=torch.float16)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    convolve = trusted_convolution(device, torch.float16)
    out = convolved(convolve, x, weight)
    for _ in range(3):
        convolve(x, weight, out)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        convolve(x, weight, out)
    torch.cuda.synchronize()
    return 10 * 2 * 27 * 128 * 128 * out[..., 0].numel() / (time.perf_counter() - start)


def measured(run: Callable[[], None], warm_up: Callable[[], None]) -> str:
    """Seconds | allocated | reserved | host, of `run` after `warm_up`, weights included."""
    for work in (warm_up, run):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = rss()
        with PeakRss() as host:
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    allocated, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return (
        f"{seconds:.2f} | {allocated:.2f} | {reserved:.2f} | {host.peak / GIB:.2f} (+{(host.peak - before) / GIB:.2f})"
    )


def bench_engine(options: argparse.Namespace, device: torch.device) -> None:
    config, chunking = VaeConfig(), DecodeChunking(int(options.device_gib * GIB), int(options.host_gib * GIB))
    rate = convolution_rate(device)
    chosen = trusted_convolution(device, torch.float16).__name__
    attends = trusted_attention(device, torch.float16).__name__
    print(f"conv3d 128->128: {rate / 1e12:.0f} TFLOP/s; used: {chosen}, attention {attends}\n")
    print("| size | decoder | s | allocated | reserved | host RSS, GiB | predicted device / host | floor s |")
    print("|---|---|---|---|---|---|---|---|")
    with torch.device("meta"):
        decoder = VaeDecoder(config)
    random_module(decoder, device)
    reports: list[str] = []
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        latent = torch.randn(16, (options.frames - 1) // 4 + 1, height // 8, width // 8, device=device)
        shape = Shape(*latent.shape[1:])
        for name in options.policies:
            policy = POLICIES[name]
            need, held = (count(config, shape, policy, chunking, 2) / GIB for count in (decode_bytes, host_bytes))
            clip = Clip(decoder, latent, policy, chunking)
            floor = floor_seconds(config, shape, rate)
            row = attempt(lambda: measured(clip.decode, clip.under_profiler if options.kernels else clip.warm_up))  # noqa: B023
            print(f"| {size}x{options.frames} | {name} | {row} | {need:.2f} / {held:.2f} | {floor:.2f} |", flush=True)
            reports.append(attempt(clip.report) if options.profile else "")
            reports.append(clip.kernels)
    print("\n".join(reports))
    if options.profile:
        attempt(lambda: bench_attention(device))


def attempt(run: Callable[[], str | None]) -> str:
    """What it returns; where it fails, the trace, and what else is asked for goes on."""
    try:
        return run() or ""
    except Exception as error:  # noqa: BLE001, a bench says what went wrong and goes on
        traceback.print_exc()
        return f"{type(error).__name__} | | | "


class Clip:
    """A decode that notes when its segments begin on the device, and how long the host is where."""

    def __init__(self, decoder: VaeDecoder, latent: torch.Tensor, policy: Policy, chunking: DecodeChunking) -> None:
        self._decoder, self._latent, self._policy, self._chunking = decoder, latent, policy, chunking
        self._marks: list[tuple[tuple[int, int] | None, torch.cuda.Event]] = []
        self._spent: dict[str, float] = {}
        self.kernels = ""

    def warm_up(self) -> None:
        pieces = decode_frames(self._decoder, self._latent, self._policy, self._chunking)
        next(pieces)
        pieces.close()

    def under_profiler(self) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.warm_up()
            torch.cuda.synchronize()
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=90)
        self.kernels = f"{self._policy.name}, kernels while it warmed up:\n{table}"

    def decode(self) -> None:
        with self._watched():
            start = time.perf_counter()
            pieces = decode_frames(self._decoder, self._latent, self._policy, self._chunking, self._mark)
            before = 0.0
            for index, _ in enumerate(pieces):
                before = before if index else time.perf_counter() - start
            self._spent["all"] = time.perf_counter() - start
            self._spent["all up to the first frames"] = before

    def _mark(self, step: Step | None) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((None if step is None else (step.segment.first, step.segment.last), event))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Adds up the time in these functions, in whichever thread, while a `with` lasts."""
        with contextlib.ExitStack() as stack:
            for owner, name, label in WATCHED:
                patch = unittest.mock.patch.object(owner, name, self._timed(getattr(owner, name), label))
                stack.enter_context(patch)
            yield

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self._spent[label] = self._spent.get(label, 0) + time.perf_counter() - start

        return run

    def report(self) -> str:
        lines = [f"\n{self._policy.name}: the host's time\n\n| in | s |\n|---|---|"]
        lines += [f"| {label} | {seconds:.3f} |" for label, seconds in self._spent.items()]
        seconds: dict[tuple[int, int], float] = {}
        for (segment, event), (_, following) in itertools.pairwise(self._marks):
            if segment is not None:
                seconds[segment] = seconds.get(segment, 0) + event.elapsed_time(following) / 1e3
        lines.append("\n| stages | s on the device |\n|---|---|")
        for (first, last), taken in seconds.items():
            names = ", ".join(f"{s.kind} {s.inputs}>{s.outputs}" for s in stages(self._decoder.config)[first:last])
            lines.append(f"| {first}-{last}: {names} | {taken:.3f} |")
        lines.append(f"| all | {sum(seconds.values()):.3f} |")
        stats = torch.cuda.memory_stats()
        lines.append(f"allocator: {stats['num_alloc_retries']} retries, {stats['num_ooms']} out of memory\n")
        return "\n".join(lines)


def bench_attention(device: torch.device) -> None:
    """One frame of 90x160 against 33, both ways."""
    shape, channels = Shape(33, 90, 160), 512
    at = attention_layout(shape, channels, 2, on_host=False)
    room = Room(torch.empty(at.size, dtype=torch.uint8, device=device), torch.float16)
    q, k, v = (room.at(place, (n, channels)) for place, n in ((at.q, 14400), (at.k, 475200), (at.v, 475200)))
    for tensor in (q, k, v):
        tensor.normal_()
    for attend in (fused, by_products):
        attend(q, k, v, room, at)
        torch.cuda.synchronize()
        start = time.perf_counter()
        attend(q, k, v, room, at)
        torch.cuda.synchronize()
        print(f"attention {attend.__name__}: {(time.perf_counter() - start) * 1e3:.0f} ms")


def bench_encoder(size: str, device: torch.device) -> None:
    width, height = map(int, size.split("x"))
    with torch.device("meta"):
        encoder = VaeEncoder(VaeConfig())
    folded = ImageEncoder(random_module(encoder, device))
    picture = torch.rand(3, 1, height, width, device=device)
    need = encode_bytes(VaeConfig(), width, height, 2) / GIB

    def encode() -> None:
        folded.encode(picture)

    print(f"| {size} | encode a picture | {measured(encode, encode)} | {need:.2f} | |", flush=True)


def bench_diffusers(options: argparse.Namespace, device: torch.device) -> None:
    try:
        from diffusers import AutoencoderKLHunyuanVideo
    except ImportError:
        print("diffusers is not installed")
        return
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo()
    del vae.encoder
    vae = random_module(vae, device)
    width, height = map(int, options.sizes[0].split("x"))
    latent = torch.randn(1, 16, (options.frames - 1) // 4 + 1, height // 8, width // 8, device=device).half()
    vae.enable_tiling()
    ends, begun = [0.0], [0]

    def count(*_: object) -> None:
        torch.cuda.synchronize()
        begun[0] += 1
        if time.perf_counter() > ends[0]:
            raise TimeoutError

    vae.decoder.register_forward_pre_hook(count)

    def decode(part: torch.Tensor) -> None:
        begun[0], ends[0] = 0, time.perf_counter() + options.limit
        with torch.inference_mode():
            try:
                vae.decode(part, return_dict=False)
            except TimeoutError:
                print(f"ended after {options.limit:.0f} s, before tile {begun[0]}:")

    for name, frames, stride in (("diffusers 16/12", 16, 12), ("diffusers 64/48", 64, 48)):
        vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = frames, stride
        small = latent[:, :, : frames // 4 + 1, :32, :32]
        row = attempt(lambda: measured(lambda: decode(latent), lambda: decode(small)))  # noqa: B023
        print(f"| {options.sizes[0]}x{options.frames} | {name} | {row} | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1280x720", "960x544", "512x512"])
    parser.add_argument("--policies", nargs="+", default=["seamless", "reference"])
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--device-gib", type=float, default=DecodeChunking().device_bytes / GIB)
    parser.add_argument("--host-gib", type=float, default=DecodeChunking().host_bytes / GIB)
    parser.add_argument("--worth", type=float, default=planning_module.WORTH, help="in place of planning.WORTH")
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument("--limit", type=float, default=24.0, help="seconds for each of diffusers' runs")
    parser.add_argument("--profile", action="store_true", help="where the host's and the device's time goes")
    parser.add_argument("--kernels", action="store_true", help="which kernels take longest")
    options = parser.parse_args()
    device = pick_device("cuda")
    print(describe(device))
    if options.diffusers:
        bench_diffusers(options, device)
        return
    planning_module.WORTH = options.worth
    bench_engine(options, device)
    bench_encoder(options.sizes[0], device)


if __name__ == "__main__":
    main()
