"""Streamed against resident at full size, in one process: `python tests/bench/streaming.py --model DIR`.

Runs the transformer alone, on random latents and conditioning, once for each way of holding the blocks (a number of
resident ones, -1 for all; `:mapped` after it reads the others from the file) and each size of chunks: loads its
weights, runs one small step to warm up, times steps by events on the device (the host waits only after the last), and
prints a table row with the median step, peaks of device memory, and whether the results are the bits of the first row.
`--kernels` lists what one more step runs on the device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from step_inputs import Inputs, random_inputs  # noqa: E402

from lowvram_i2v import attention  # noqa: E402
from lowvram_i2v.checkpoint import ModelFolder, ModelHeader, read_records  # noqa: E402
from lowvram_i2v.device import describe, pick_device, release  # noqa: E402
from lowvram_i2v.dit.conditioning import is_conditioning  # noqa: E402
from lowvram_i2v.dit.config import TransformerConfig  # noqa: E402
from lowvram_i2v.dit.token_order import token_order  # noqa: E402
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block  # noqa: E402
from lowvram_i2v.dit.workspace import Chunking, Workspace  # noqa: E402
from lowvram_i2v.kernels.ops import PLAIN, choose  # noqa: E402
from lowvram_i2v.kernels.quant_linear import set_compute  # noqa: E402
from lowvram_i2v.safetensors_file import open_safetensors  # noqa: E402
from lowvram_i2v.sampling.denoise import GuidedVelocity  # noqa: E402
from lowvram_i2v.streaming.block_stream import BlockStream  # noqa: E402
from lowvram_i2v.streaming.load import stream_blocks  # noqa: E402
from lowvram_i2v.vae.config import VaeConfig  # noqa: E402
from lowvram_i2v.variant import VARIANTS  # noqa: E402


@torch.inference_mode()
def time_steps(velocity: GuidedVelocity, warming: GuidedVelocity, inputs: Inputs) -> tuple[list[float], torch.Tensor]:
    """Seconds of each step, and the sum of the velocities of all of them. warming: the same for two frames."""
    for step in {0, len(inputs.steps) - 1}:
        warming(inputs.latents[:, :2], step)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(inputs.steps) + 1)]
    marks[0].record()
    total: torch.Tensor | None = None
    for step, mark in enumerate(marks[1:]):
        result = velocity(inputs.latents, step)
        total = result if total is None else total + result
        mark.record()
    torch.cuda.synchronize()
    assert total is not None
    seconds = [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
    return seconds, total.cpu()


def _first(inputs: Inputs, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary table of the first latent frames."""
    tokens = frames * len(inputs.rope[0]) // inputs.latents.shape[1]
    return inputs.rope[0][:tokens], inputs.rope[1][:tokens]


def _grid(inputs: Inputs) -> tuple[int, int, int]:
    """Tokens in time and space."""
    _, frames, height, width = inputs.latents.shape
    return frames, height // 2, width // 2


def measure(
    model: ModelFolder, inputs: Inputs, options: argparse.Namespace, way: str, first: torch.Tensor | None
) -> list[tuple[float, torch.Tensor]]:
    """Rows of the table, one for each size of chunks; the median step in seconds, and the result."""
    device = torch.device("cuda", torch.cuda.current_device())
    resident, host = int(way.partition(":")[0]), way.partition(":")[2] or "pinned"
    start, made = time.perf_counter(), []
    with loaded(model, device, resident, options.slots, host, options.attention) as (transformer, stream):
        loading = time.perf_counter() - start
        set_compute(transformer, options.compute)
        for rows in options.rows:
            weights = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            velocity, warming = velocities(model, inputs, options, rows, (transformer, stream))
            seconds, result = time_steps(velocity, warming, inputs)
            same = "-" if first is None else "yes" if torch.equal(first, result) else "NO"
            first = result if first is None else first
            print_row(f"{way}, {rows}", seconds, weights, loading, same)
            made.append((statistics.median(seconds), result))
            if options.kernels:
                print_kernels(velocity, inputs)
            del velocity, warming
            release(device)
    release(device)
    return made


def velocities(
    model: ModelFolder,
    inputs: Inputs,
    options: argparse.Namespace,
    rows: int,
    loaded: tuple[HunyuanVideoTransformer, BlockStream[torch.cuda.Event]],
) -> tuple[GuidedVelocity, GuidedVelocity]:
    """The whole video's, and that of two frames to warm up, in one workspace."""
    (transformer, stream), device = loaded, inputs.latents.device
    ops = choose(device) if options.ops == "fused" else PLAIN
    tokens, chunking = (len(inputs.rope[0]), len(inputs.steps[0].txt)), Chunking(rows, options.heads)
    work = Workspace(model.header.transformer, *tokens, chunking, device, torch.bfloat16, ops)
    by_layout = attention.by_layout(options.attention, options.density, options.after)
    guided = partial(GuidedVelocity, transformer, inputs.steps, None, 1.0)
    order = None if by_layout is None else token_order(_grid(inputs), transformer.config.patch_size).to(device)
    return guided(inputs.rope, stream, work, by_layout, order), guided(_first(inputs, 2), stream, work, by_layout)


def print_row(way: str, seconds: list[float], weights: int, loading: float, same: str) -> None:
    device = torch.cuda.current_device()
    row = [
        way,
        f"{statistics.median(seconds):.3f} s",
        f"{min(seconds):.3f} .. {max(seconds):.3f} s",
        f"{statistics.mean(seconds):.3f} s",
        f"{weights / 2**30:.2f} GiB",
        f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB",
        f"{torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB",
        f"{loading:.1f} s",
        same,
    ]
    print(f"| {' | '.join(row)} |", flush=True)


@torch.inference_mode()
def print_kernels(velocity: GuidedVelocity, inputs: Inputs, most: int = 24) -> None:
    """What one more step ran on the device, by name: how often, and for how long in all."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        velocity(inputs.latents, len(inputs.steps) - 1)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name[:70], []).append(event.time_range.elapsed_us() / 1e3)
    print("| kernel | calls | ms | longest |\n|---|---|---|---|")
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:most]:
        print(f"| {name} | {len(times)} | {sum(times):.1f} | {max(times):.3f} |", flush=True)


@contextmanager
def loaded(
    model: ModelFolder, device: torch.device, resident: int, slots: int, host: str, backend: str
) -> Iterator[tuple[HunyuanVideoTransformer, BlockStream[torch.cuda.Event]]]:
    """The transformer without what runs before the loop, and the stream of its blocks."""
    with (
        model.load(
            "transformer",
            lambda: HunyuanVideoTransformer(model.header.transformer, attention.get(backend)),
            device=device,
            dtype=torch.bfloat16,
            only=lambda name: not is_conditioning(name) and not is_in_block(name),
        ) as transformer,
        stream_blocks(
            model.files["transformer"],
            transformer.blocks(),
            device=device,
            dtype=torch.bfloat16,
            resident=resident,
            slots=slots,
            host=host,
            only=lambda name: not is_conditioning(name),
        ) as stream,
    ):
        yield transformer, stream


def open_transformer(folder: Path) -> ModelFolder:
    """A model folder of which only the transformer needs to be there."""
    record = read_records(folder).components["transformer"]
    config = TransformerConfig.from_dict(record.config)
    variant = next(variant for variant in VARIANTS.values() if variant.in_channels == config.in_channels)
    header = ModelHeader(variant, config, VaeConfig(), {}, {}, {"transformer": record})
    return ModelFolder(folder, header, {"transformer": open_safetensors(folder / "transformer.safetensors")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model folder of full size")
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=300)
    parser.add_argument("--resident", nargs="+", default=["-1", "0"], metavar="N[:mapped]", help="-1: all")
    parser.add_argument("--compute", default="w8a16")
    parser.add_argument("--ops", default="plain", choices=("plain", "fused"), help="element-wise chains")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="tokens of a chunk")
    parser.add_argument("--kernels", action="store_true", help="list what a step runs on the device")
    parser.add_argument("--heads", type=int, default=24, help="of one attention call")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--density", type=float, default=0.2, help="of triton-sparse")
    parser.add_argument("--after", type=float, default=0.2, help="share of dense steps before, of triton-sparse")
    options = parser.parse_args()
    device, model = pick_device("cuda"), open_transformer(options.model)
    width, height = (int(side) for side in options.size.split("x"))
    inputs = random_inputs(
        model.header.transformer,
        size=(width, height),
        frames=options.frames,
        steps=options.steps,
        device=device,
        dtype=torch.bfloat16,
        text_tokens=options.text_tokens,
    )
    what = f"{model.header.scheme} {options.compute}, {options.ops} ops, {options.attention}"
    print(f"{what}, {options.size}x{options.frames}, {describe(device)}")
    print("| resident blocks, rows | median step | min .. max | mean | weights | peak | reserved | load | same bits |")
    print("|---|---|---|---|---|---|---|---|---|")
    medians, result = [], None
    for resident in options.resident:
        made = measure(model, inputs, options, resident, result)
        result = made[0][1] if result is None else result
        medians.append(made[0][0])
    for resident, median in zip(options.resident[1:], medians[1:], strict=True):
        print(f"  {resident} resident: {100 * (median / medians[0] - 1):+.2f} % of the first row's step")


if __name__ == "__main__":
    main()
