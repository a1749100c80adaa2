"""Do copies run under computing? `python tests/bench/timeline.py --model DIR`: one streamed step under a profiler.

Prints how long the device computed and copied, how much of the copying fell into computing, how long it did neither,
and how often the host waited for it in the step (calls that synchronize).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.streaming import loaded, open_transformer  # noqa: E402
from step_inputs import random_inputs  # noqa: E402

from lowvram_i2v.device import pick_device  # noqa: E402
from lowvram_i2v.dit.workspace import Chunking, Workspace  # noqa: E402

Spans = list[tuple[float, float]]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def merged(spans: Spans) -> Spans:
    """Disjoint spans that cover the same time."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--frames", type=int, default=129)
    options = parser.parse_args()
    device, model = pick_device("cuda"), open_transformer(options.model)
    config, (width, height) = model.header.transformer, (int(side) for side in options.size.split("x"))
    inputs = random_inputs(
        config, size=(width, height), frames=options.frames, steps=1, device=device, dtype=torch.bfloat16
    )
    with loaded(model, device, 0, 2, "pinned", "sdpa") as (transformer, stream):
        text = len(inputs.steps[0].txt)
        work = Workspace(config, len(inputs.rope[0]), text, Chunking(4096, config.heads), device, dtype=torch.bfloat16)
        transformer.predict(inputs.latents, inputs.steps[0], inputs.rope, stream, work)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            transformer.predict(inputs.latents, inputs.steps[0], inputs.rope, stream, work)
            torch.cuda.synchronize()
    report(recorded)


def report(recorded: profile) -> None:
    copies: Spans = []
    kernels: Spans = []
    waits: dict[str, int] = {}
    for event in recorded.events():
        span = (event.time_range.start, event.time_range.end)
        if event.device_type == torch.autograd.DeviceType.CUDA:
            (copies if "HtoD" in event.name else kernels).append(span)
        elif event.name in WAITS:
            waits[event.name] = waits.get(event.name, 0) + 1
    copies, kernels = merged(copies), merged(kernels)
    either = merged(copies + kernels)
    both = length(copies) + length(kernels) - length(either)
    whole = either[-1][1] - either[0][0]
    print(f"step {whole / 1e6:.3f} s: computing {length(kernels) / 1e6:.3f} s, copying {length(copies) / 1e6:.3f} s")
    idle = (whole - length(either)) / 1e3
    print(f"  {100 * both / length(copies):.1f} % of the copying under computing; neither for {idle:.1f} ms")
    print(f"  calls that wait (one synchronize ends the measurement): {waits}")


if __name__ == "__main__":
    main()
