"""Streamed against resident at full size, in one process: `python tests/bench/streaming.py --model DIR`.

Runs the transformer alone, on random latents and conditioning, once for each number of resident blocks: loads its
weights, times steps by events on the device (the host waits only after the last), and prints a table row with the
median step, peaks of device memory, and whether the results are the bits of the first row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from step_inputs import Inputs, random_inputs  # noqa: E402

from lowvram_i2v import attention  # noqa: E402
from lowvram_i2v.checkpoint import ModelFolder, ModelHeader, read_records  # noqa: E402
from lowvram_i2v.device import describe, pick_device, release  # noqa: E402
from lowvram_i2v.dit.conditioning import is_conditioning  # noqa: E402
from lowvram_i2v.dit.config import TransformerConfig  # noqa: E402
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block  # noqa: E402
from lowvram_i2v.safetensors_file import open_safetensors  # noqa: E402
from lowvram_i2v.streaming.block_stream import BlockStream  # noqa: E402
from lowvram_i2v.streaming.load import stream_blocks  # noqa: E402
from lowvram_i2v.vae.config import VaeConfig  # noqa: E402
from lowvram_i2v.variant import VARIANTS  # noqa: E402


@torch.inference_mode()
def time_steps(
    transformer: HunyuanVideoTransformer, stream: BlockStream[torch.cuda.Event], inputs: Inputs
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each step, and the sum of the velocities of all of them."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(inputs.steps) + 1)]
    marks[0].record()
    total: torch.Tensor | None = None
    for step, mark in zip(inputs.steps, marks[1:], strict=True):
        velocity = transformer.predict(inputs.latents, step, inputs.rope, stream)
        total = velocity if total is None else total + velocity
        mark.record()
    torch.cuda.synchronize()
    assert total is not None
    seconds = [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
    return seconds, total.cpu()


def measure(
    model: ModelFolder, inputs: Inputs, options: argparse.Namespace, resident: int, first: torch.Tensor | None
) -> tuple[float, torch.Tensor]:
    """One row of the table; the median step in seconds, and the result."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with (
        model.load(
            "transformer",
            lambda: HunyuanVideoTransformer(model.header.transformer, attention.get(options.attention)),
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
            slots=options.slots,
            only=lambda name: not is_conditioning(name),
        ) as stream,
    ):
        loading = time.perf_counter() - start
        weights = torch.cuda.memory_allocated(device)
        seconds, result = time_steps(transformer, stream, inputs)
    median = statistics.median(seconds[1:])  # the first one warms up
    same = "-" if first is None else "yes" if torch.equal(first, result) else "NO"
    row = [
        "all" if resident < 0 else str(resident),
        f"{median:.3f} s",
        f"{min(seconds[1:]):.3f} .. {max(seconds[1:]):.3f} s",
        f"{seconds[0]:.3f} s",
        f"{weights / 2**30:.2f} GiB",
        f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB",
        f"{torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB",
        f"{loading:.1f} s",
        same,
    ]
    print(f"| {' | '.join(row)} |", flush=True)
    release(device)
    return median, result


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
    parser.add_argument("--steps", type=int, default=6, help="the first one is not counted")
    parser.add_argument("--text-tokens", type=int, default=300)
    parser.add_argument("--resident", type=int, nargs="+", default=[-1, 0], help="-1: all")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: two or more, the first one is not counted")
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
    print(f"{model.header.scheme}, {options.size}x{options.frames}, {options.slots} slots, {describe(device)}")
    print("| resident blocks | median step | min .. max | first step | weights | peak | reserved | load | same bits |")
    print("|---|---|---|---|---|---|---|---|---|")
    medians, result = [], None
    for resident in options.resident:
        median, result_now = measure(model, inputs, options, resident, result)
        result = result_now if result is None else result
        medians.append(median)
    for resident, median in zip(options.resident[1:], medians[1:], strict=True):
        print(f"  {resident} resident: {100 * (median / medians[0] - 1):+.2f} % of the first row's step")


if __name__ == "__main__":
    main()
