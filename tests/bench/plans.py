"""Predicted against measured peaks of the denoising phase: `python tests/bench/plans.py --model DIR`.

For each profile and each size: makes the plan, limits the allocator to its budget, loads weights outside the blocks and
the resident blocks, and runs the start of a step: two double blocks, a single one and the last layer (every other block
repeats what these do, in the same memory). Streamed blocks come from the file, so that not every row fills RAM; on the
device that is the same. Prints table rows.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.streaming import loaded, open_transformer  # noqa: E402
from step_inputs import random_inputs  # noqa: E402

from lowvram_i2v import attention  # noqa: E402
from lowvram_i2v.attention import Layout  # noqa: E402
from lowvram_i2v.checkpoint import ModelFolder  # noqa: E402
from lowvram_i2v.device import describe, limited, outside_allocator, pick_device, release  # noqa: E402
from lowvram_i2v.dit import chunked  # noqa: E402
from lowvram_i2v.dit.workspace import Workspace  # noqa: E402
from lowvram_i2v.kernels.ops import choose  # noqa: E402
from lowvram_i2v.kernels.quant_linear import set_compute  # noqa: E402
from lowvram_i2v.plan import GIB, Machine, MemoryPlan, Video, make_plan, tokens  # noqa: E402
from lowvram_i2v.profile import VramProfile, load_profile, profile_names  # noqa: E402
from lowvram_i2v.sizes import sizes_of  # noqa: E402
from lowvram_i2v.synth.headers import model_headers  # noqa: E402

VIDEOS = (
    Video(1280, 720, 129),
    Video(1280, 720, 45),
    Video(960, 544, 129),
    Video(512, 512, 129),
    Video(640, 368, 65),
)


@torch.inference_mode()
def measure(model: ModelFolder, plan: MemoryPlan, profile: VramProfile, video: Video, text: int) -> tuple[int, int]:
    """Peak bytes reserved and allocated."""
    device, config = torch.device("cuda", torch.cuda.current_device()), model.header.transformer
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    with (
        limited(device, plan.limit),
        loaded(model, device, plan.resident, plan.slots, "mapped", profile.attention) as (transformer, stream),
    ):
        set_compute(transformer, profile.compute)
        inputs = random_inputs(
            config,
            size=(video.width, video.height),
            frames=video.frames,
            steps=1,
            device=device,
            dtype=torch.bfloat16,
            text_tokens=text,
        )
        image, ops = len(inputs.rope[0]), choose(device)
        work = Workspace(config, image, text, plan.chunking, device, torch.bfloat16, ops)

        step = replace(inputs.steps[0], modulation=inputs.steps[0].modulation.float())
        frame = image // inputs.latents.shape[1]
        by_layout = attention.by_layout(profile.attention, profile.sparse_density, 0.0)
        attend = by_layout(Layout(frame, image, text, 0, 1)) if by_layout else transformer.attend
        first = frame if step.vectors == 2 else 0
        run = chunked.begin(work, transformer.img_in, inputs.latents, step.txt, first, inputs.rope, attend)
        double, single = step.double(), step.single()
        for place, block in enumerate(stream):
            if place < 2:
                chunked.double_block(block, run, next(double))
            elif place == config.double_blocks:
                chunked.single_block(block, run, next(single))
                break
        chunked.final_layer(transformer.final_layer.linear, run, step.final())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model folder of full size")
    parser.add_argument("--profiles", nargs="+", default=profile_names())
    options = parser.parse_args()
    device, model = pick_device("cuda"), open_transformer(options.model)
    torch.zeros(1, device=device)
    headers = model_headers("full", model.header.variant, model.header.scheme)
    sizes, machine = sizes_of(headers), Machine(torch.cuda.mem_get_info(device)[0], None)
    print(f"{model.header.scheme}, {describe(device)}")
    print("| profile | video | resident | chunk, heads | planned | reserved | off | allocated | with context |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.profiles:
        profile = replace(load_profile(name), host="mapped")
        for video in VIDEOS:
            plan = make_plan(sizes, video, profile, machine)
            planned, text = plan.vram("denoise"), tokens(sizes, video)[1]
            reserved, allocated = measure(model, plan, profile, video, text)
            row = [
                name,
                str(video),
                f"{plan.resident}",
                f"{plan.chunking.rows}, {plan.chunking.heads}",
                f"{planned / GIB:.2f}",
                f"{reserved / GIB:.2f}",
                f"{100 * (planned / reserved - 1):+.1f} %",
                f"{allocated / GIB:.2f}",
                f"{(reserved + outside_allocator(device)) / GIB:.2f}",
            ]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
