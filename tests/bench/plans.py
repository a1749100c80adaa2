"""Predicted against measured peaks of the denoising phase: `python tests/bench/plans.py --profiles 6gb 6gb-fast`.

For each profile and each video: makes the plan, limits the allocator to its budget, and runs two steps of the sampling
loop through two blocks of each kind and the last layer (every other block repeats what these do, in the same memory).
No model is needed: weights have the released model's sizes and any value. Resident blocks lie where they would, others
go through the slots, all from one place in RAM.

`--processes 2` measures rows in turn in as many processes on the same GPU: the allocator counts for each by itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from step_inputs import Inputs, random_inputs  # noqa: E402

from lowvram_i2v import attention  # noqa: E402
from lowvram_i2v.checkpoint import ModelFolder  # noqa: E402
from lowvram_i2v.device import describe, limited, multiplies_float8, pick_device, release  # noqa: E402
from lowvram_i2v.dit.conditioning import StepConditioning, is_conditioning  # noqa: E402
from lowvram_i2v.dit.config import TransformerConfig  # noqa: E402
from lowvram_i2v.dit.token_order import token_order  # noqa: E402
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer  # noqa: E402
from lowvram_i2v.dit.workspace import Workspace  # noqa: E402
from lowvram_i2v.kernels.ops import choose  # noqa: E402
from lowvram_i2v.kernels.quant_linear import set_compute  # noqa: E402
from lowvram_i2v.plan import GIB, Machine, MemoryPlan, Video, make_plan, tokens  # noqa: E402
from lowvram_i2v.profile import VramProfile, load_profile, profile_names  # noqa: E402
from lowvram_i2v.sampling.conditioning import condition  # noqa: E402
from lowvram_i2v.sampling.denoise import GuidedVelocity, denoise  # noqa: E402
from lowvram_i2v.sizes import ModelSizes, sizes_of  # noqa: E402
from lowvram_i2v.streaming.arena import arena  # noqa: E402
from lowvram_i2v.streaming.block_stream import BlockStream, streamed_places  # noqa: E402
from lowvram_i2v.streaming.copy_queue import CudaCopyQueue  # noqa: E402
from lowvram_i2v.streaming.host_blocks import Pinned  # noqa: E402
from lowvram_i2v.streaming.slab import below, layout_of  # noqa: E402
from lowvram_i2v.synth.headers import model_headers  # noqa: E402
from lowvram_i2v.variant import VARIANTS  # noqa: E402

VIDEOS = (
    Video(1280, 720, 129),
    Video(1280, 720, 45),
    Video(960, 544, 129),
    Video(512, 512, 129),
    Video(640, 368, 65),
)
RUN, STEPS = 2, 2
"""Blocks of each kind that are computed, and steps: with triton-sparse the first is dense."""
BYTE = 0x3C
"""Every byte of a weight: in bf16 and float32 this is 0.0115, in e4m3 1.5."""
COLUMNS = ("profile", "video", "resident", "chunk, heads", "planned", "reserved", "off", "allocated", "retries")
FAILED = "no memory"


@dataclass(frozen=True)
class Peaks:
    """Bytes; retries: how often the allocator gave pages back because its limit was reached."""

    reserved: int
    allocated: int
    retries: int


class FewBlocks:
    """All blocks come through the stream, the first RUN of each kind are computed."""

    def __init__(self, stream: BlockStream[torch.cuda.Event], double_blocks: int) -> None:
        self._stream, self._places = stream, {*range(RUN), *range(double_blocks, double_blocks + RUN)}

    def __iter__(self) -> Iterator[nn.Module]:
        return (block for place, block in enumerate(self._stream) if place in self._places)


@contextmanager
def streamed(
    transformer: HunyuanVideoTransformer, plan: MemoryPlan, device: torch.device
) -> Iterator[BlockStream[torch.cuda.Event]]:
    """The blocks as `stream_blocks` holds them, with weights of no file."""
    blocks = transformer.blocks()
    layouts = [
        layout_of(block, torch.bfloat16, below(name, lambda name: not is_conditioning(name)))
        for name, block in blocks.items()
    ]
    places = streamed_places(len(blocks), plan.resident, plan.slots)
    with arena(max((layouts[place].bytes for place in places), default=0), device) as memory:
        memory.fill_(BYTE)
        for place, block in enumerate(blocks.values()):
            if place not in places:
                slab = torch.empty(layouts[place].bytes, dtype=torch.uint8, device=device)
                layouts[place].bind(block, slab.fill_(BYTE))
        host = Pinned({place: memory[: layouts[place].bytes] for place in places})
        stream = BlockStream(
            list(blocks.values()),
            {place: layouts[place] for place in places},
            host,
            plan.slots,
            device,
            CudaCopyQueue(device),
        )
        try:
            yield stream
        finally:
            stream.close()


def opened(model: ModelFolder, profile: VramProfile, device: torch.device) -> HunyuanVideoTransformer:
    """The transformer with weights outside its blocks on the device, those in them nowhere yet."""
    config = model.header.transformer
    transformer = model.build("transformer", lambda: HunyuanVideoTransformer(config, attention.get(profile.attention)))
    for part in (transformer.img_in, transformer.final_layer.linear):
        part.to(torch.bfloat16).to_empty(device=device)
        for weight in part.parameters():
            nn.init.constant_(weight, 0.01)
    set_compute(transformer, profile.compute)
    return transformer.eval().requires_grad_(False)


@cache
def inputs_of(config: TransformerConfig, video: Video, text_tokens: int) -> Inputs:
    """On the CPU, conditioning page-locked."""
    made = random_inputs(
        config,
        size=(video.width, video.height),
        frames=video.frames,
        steps=STEPS,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        text_tokens=text_tokens,
    )
    return replace(made, steps=[_for_few(step.on_host(pin=True)) for step in made.steps])


def _for_few(step: StepConditioning) -> StepConditioning:
    """All of its bytes, for a model with fewer blocks."""
    return replace(step, double_blocks=RUN, single_blocks=RUN)


@torch.inference_mode()
def measure(model: ModelFolder, sizes: ModelSizes, plan: MemoryPlan, profile: VramProfile, video: Video) -> Peaks:
    """As `pipeline.sample`."""
    device, config, text = torch.device("cuda", torch.cuda.current_device()), sizes.transformer, tokens(sizes, video)[1]
    inputs = inputs_of(config, video, text)
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["num_alloc_retries"]
    transformer = opened(model, profile, device)
    with limited(device, plan.limit), streamed(transformer, plan, device) as stream:
        for kind in ("double_blocks", "single_blocks"):
            setattr(transformer, kind, getattr(transformer, kind)[:RUN])
        work = Workspace(config, len(inputs.rope[0]), text, plan.chunking, device, torch.bfloat16, choose(device))
        by_layout = attention.by_layout(profile.attention, profile.sparse_density, profile.sparse_after)
        _, *grid = inputs.latents.shape
        of_tokens = [side // patch for side, patch in zip(grid, config.patch_size, strict=True)]
        order = None if by_layout is None else token_order(_three(of_tokens), config.patch_size).to(device)
        cos, sin = (table.to(device) for table in inputs.rope)
        blocks = FewBlocks(stream, config.double_blocks)
        velocity = GuidedVelocity(transformer, inputs.steps, None, 1.0, (cos, sin), blocks, work, by_layout, order)
        start = inputs.latents[: config.out_channels]
        denoise(velocity, condition(sizes.variant, start[:, :1].to(device)), start.to(device), _sigmas(), _unseen)
        torch.cuda.synchronize()
        return Peaks(
            torch.cuda.max_memory_reserved(device),
            torch.cuda.max_memory_allocated(device),
            torch.cuda.memory_stats(device)["num_alloc_retries"] - before,
        )


def _three(sides: list[int]) -> tuple[int, int, int]:
    time, rows, columns = sides
    return time, rows, columns


def _sigmas() -> Tensor:
    return torch.linspace(1, 0, STEPS + 1)


def _unseen(step: int, latents: Tensor) -> None:
    """Nobody watches."""


def rows_of(options: argparse.Namespace) -> list[tuple[str, Video]]:
    """This process's share of the rows."""
    part, of = options.part
    return [(name, video) for name in options.profiles for video in VIDEOS][part::of]


def measure_all(options: argparse.Namespace) -> list[str]:
    """Prints the rows as they come."""
    device, model = pick_device("cuda"), model_headers("full", VARIANTS[options.variant], options.scheme)
    torch.zeros(1, device=device)
    sizes = sizes_of(model)
    machine = Machine(torch.cuda.mem_get_info(device)[0], None, multiplies_float8(device))
    if not options.part[0]:
        print(f"{options.scheme}, {options.variant}, {describe(device)}", flush=True)
    printed = []
    for name, video in rows_of(options):
        profile = load_profile(name)
        plan = make_plan(sizes, video, profile, machine)
        planned = plan.vram("denoise")
        row = [name, str(video), f"{plan.resident}", f"{plan.chunking.rows}, {plan.chunking.heads}"]
        row.append(f"{planned / GIB:.2f}")
        try:
            peaks = measure(model, sizes, plan, profile, video)
        except torch.OutOfMemoryError as error:
            row += [FAILED, str(error).partition(". ")[2].partition(".")[0], "", ""]
        else:
            row += [f"{peaks.reserved / GIB:.2f}", f"{100 * (planned / peaks.reserved - 1):+.2f} %"]
            row += [f"{peaks.allocated / GIB:.2f}", f"{peaks.retries}"]
        printed.append(f"| {' | '.join(row)} |")
        print(printed[-1], flush=True)
    return printed


def in_processes(options: argparse.Namespace) -> list[str]:
    """The same rows, from as many processes at once."""

    def share(part: int) -> list[str]:
        command = [sys.executable, __file__, "--profiles", *options.profiles, "--scheme", options.scheme]
        command += ["--variant", options.variant, "--part", str(part), str(options.processes)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        if process.wait():
            print(f"process {part} failed with {process.returncode}", flush=True)
        return lines

    with ThreadPoolExecutor(options.processes) as pool:
        return [line for lines in pool.map(share, range(options.processes)) for line in lines]


def summary(rows: list[str]) -> str:
    """The lowest and highest prediction of each profile, of those rows that were measured."""
    off, failed = defaultdict(list), defaultdict(int)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) != len(COLUMNS):
            continue
        if cells[5] == FAILED:
            failed[cells[0]] += 1
        else:
            off[cells[0]].append(float(cells[6].removesuffix(" %")))
    lines = ["", "| profile | rows | worst under | worst over | within -2 .. +5 % |", "|---|---|---|---|---|"]
    for name in sorted({*off, *failed}):
        low, high = min(off[name], default=0.0), max(off[name], default=0.0)
        right = "yes" if low >= -2 and high <= 5 and not failed[name] else "NO"
        count = f"{len(off[name])}" + (f", {failed[name]} without memory" if failed[name] else "")
        lines.append(f"| {name} | {count} | {low:+.2f} % | {high:+.2f} % | {right} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs="+", default=profile_names())
    parser.add_argument("--scheme", default="int8", choices=("int8", "fp8", "nf4", "bf16"))
    parser.add_argument("--variant", default="token_replace", choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=1, help="that share the GPU")
    parser.add_argument("--part", type=int, nargs=2, default=None, metavar=("N", "OF"), help="only these rows")
    options = parser.parse_args()
    if options.part is not None:
        measure_all(options)
        return
    options.part = (0, 1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    print(summary(measure_all(options) if options.processes == 1 else in_processes(options)), flush=True)


if __name__ == "__main__":
    main()
