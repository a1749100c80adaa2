"""One denoising step of diffusers' transformer at full size, bf16 and resident, as the peer to be measured beside ours:
`python tests/bench/diffusers_step.py --size 512x512 1280x720`. Random weights made on the device; needs diffusers."""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise

import torch


def build(device: torch.device) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(
            image_condition_type="token_replace", guidance_embeds=True, in_channels=16, out_channels=16
        )
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_("norm" in name)
    return model  # type: ignore[no-any-return]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=["512x512", "1280x720"])
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    model = build(device)
    print(f"diffusers, bf16, resident, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for number, size in enumerate(options.size):
        width, height = (int(side) for side in size.split("x"))
        latents = torch.randn(
            1, 16, (options.frames - 1) // 4 + 1, height // 8, width // 8, device=device, dtype=torch.bfloat16
        )
        mask = torch.zeros(1, 400, device=device, dtype=torch.long)
        mask[:, :300] = 1
        inputs = {
            "timestep": torch.tensor([500.0], device=device),
            "encoder_hidden_states": torch.randn(1, 400, 4096, device=device, dtype=torch.bfloat16),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, 768, device=device, dtype=torch.bfloat16),
            "guidance": torch.tensor([6000.0], device=device, dtype=torch.bfloat16),
            "return_dict": False,
        }
        if number == 0:
            model(latents, **inputs)
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(options.steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            model(latents, **inputs)
            mark.record()
        torch.cuda.synchronize()
        seconds = [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
        peak, reserved = (x / 2**30 for x in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        print(
            f"| diffusers {size}x{options.frames} | median {statistics.median(seconds):.3f} s "
            f"({min(seconds):.3f} .. {max(seconds):.3f}) | {peak:.2f} GiB ({reserved:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
