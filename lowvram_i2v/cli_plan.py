"""`plan` and `profiles`: what a run will take, before a weight is read or a GPU is asked."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_i2v.demo_model import model_path
from lowvram_i2v.errors import RequestError, ResourceError
from lowvram_i2v.profile import DEFAULT_PROFILE, VramProfile, load_profile, profile_names
from lowvram_i2v.request import RESOLUTIONS, GenerateRequest, nearest_bucket
from lowvram_i2v.variant import VARIANTS

if TYPE_CHECKING:
    from lowvram_i2v.plan import Machine, MemoryPlan, Video
    from lowvram_i2v.sizes import ModelSizes

WIDE = (16, 9)
"""The picture that `--resolution` is planned for if no ratio is known."""
SCHEMES = ("int8", "fp8", "nf4", "bf16")
SCHEME, VARIANT = "int8", "token_replace"
"""Of the released model, where nothing else is said."""


def add_commands(commands: Any, size: Any) -> None:
    """Adds both. size: the parser of WIDTHxHEIGHT."""
    default = GenerateRequest(Path(), "", Path())
    parser = commands.add_parser("plan", help="what a run will take, without weights or GPU; what fits")
    parser.set_defaults(command=_plan)
    add = parser.add_argument
    add("--profile", metavar="NAME", default=DEFAULT_PROFILE, help="see `lowvram-i2v profiles` (default %(default)s)")
    add("--model", type=model_path, metavar="DIR", help="a model folder, or demo; without it the released model")
    add("--scheme", choices=SCHEMES, help=f"of the released model (default {SCHEME})")
    add("--variant", choices=VARIANTS, help=f"of the released model (default {VARIANT})")
    sized = parser.add_mutually_exclusive_group()
    sized.add_argument(
        "--resolution", choices=RESOLUTIONS, default=default.resolution, help="16:9 in it (default %(default)s)"
    )
    sized.add_argument("--size", type=size, metavar="WxH", help="exact size in pixels instead of --resolution")
    add("--frames", type=int, default=default.frames, metavar="N", help="4n+1 (default %(default)s)")
    add("--steps", type=int, default=default.steps, metavar="N", help="(default %(default)s)")
    add("--cfg", type=float, default=default.cfg, metavar="X", help="above 1 each step runs twice")
    add("--vram", type=float, metavar="GIB", help="plan for a card with this much free, CUDA's part included")
    add("--ram", type=float, metavar="GIB", help="plan for this much free RAM, before the program starts")
    add("--max-frames", action="store_true", help="only say how many frames fit at this size")
    add("--max-size", action="store_true", help="only say which size of this ratio fits with these frames")
    profiles = commands.add_parser("profiles", help="list the profiles")
    profiles.set_defaults(command=_profiles)


def _profiles(options: argparse.Namespace) -> int:
    for name in profile_names():
        print(f"{name:12} {load_profile(name).description}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from lowvram_i2v.plan import GIB, fits, largest_size, limit_of, make_plan, most_frames

    profile, video, sizes = load_profile(options.profile), _video(options), _sizes(options)
    machine = _machine(options, profile)
    limit = limit_of(profile, machine)
    if limit is None:
        raise RequestError(
            f"profile {profile.name} takes what is free on a card, and no card is known here",
            "Name a profile of a size (--profile 8gb), or what is free (--vram 7.4).",
        )
    fitting = partial(fits, sizes, profile=profile, machine=machine)
    if options.max_frames:
        frames = most_frames(video, fitting)
        print(f"{video.width}x{video.height}: {f'up to {frames} frames' if frames else 'no number of frames fits'}")
    if options.max_size:
        size = largest_size(video, fitting)
        print(f"{video.frames} frames: {f'up to {size[0]}x{size[1]}' if size else 'no size fits'}")
    if options.max_frames or options.max_size:
        return 0
    plan = make_plan(sizes, video, profile, machine)
    try:
        older = make_plan(sizes, video, profile, replace(machine, float8=False))
    except ResourceError:
        older = None
    print(f"{video}; {sizes.scheme or 'bf16'} weights; profile {profile.name}")
    print(plan.table())
    if older != plan:
        takes = "it does not fit"
        if older is not None:
            takes = f"denoise takes {older.vram('denoise') / GIB:.2f} GiB, {older.resident} blocks stay"
        print(f"on RTX 30 cards, which have no 8-bit floats, {takes}")
    print(estimates(plan, older, sizes, video, profile))
    return 0


def estimates(plan: MemoryPlan, older: MemoryPlan | None, sizes: ModelSizes, video: Video, profile: VramProfile) -> str:
    """Seconds a step and minutes in all on the cards that could hold the plan. From published rates, not measured.

    older: the plan for cards without 8-bit floats, None where it does not fit.
    """
    from lowvram_i2v.cards import CARDS, DISK, Work, attention_time, step_seconds
    from lowvram_i2v.plan import tokens
    from lowvram_i2v.sizes import ELEMENT

    work, passes = Work.of(sizes.transformer, *tokens(sizes, video), ELEMENT), 2 if video.cfg else 1
    eight_bit = profile.compute == "w8a8" and sizes.scheme == "int8"
    attention = attention_time(profile.attention, profile.sparse_density, profile.sparse_after)
    reads = any(own is not None and own.host == "mapped" and own.streamed for own in (plan, older))
    disk = f" and a disk that gives {DISK:.1f} GB/s of blocks" if reads else ""
    lines = [f"estimated, not measured, from published rates{disk} (denoising only):"]
    for card in CARDS:
        own = plan if card.float8 else older
        if own is None or card.vram_gib < (max(phase.vram for phase in own.phases) + own.reserve) / 2**30:
            continue
        one = step_seconds(card, work, own.streamed, eight_bit, attention, from_file=own.host == "mapped")
        step = passes * one
        lines.append(f"  {card.name:14} {step:6.1f} s a step, {video.steps * step / 60:5.1f} min for {video.steps}")
    return "\n".join(lines)


def _video(options: argparse.Namespace) -> Video:
    from lowvram_i2v.plan import Video

    request = GenerateRequest(
        Path(),
        "",
        Path(),
        resolution=options.resolution,
        size=options.size,
        frames=options.frames,
        steps=options.steps,
        cfg=options.cfg,
    )
    request.check()
    height, width = nearest_bucket(*WIDE, RESOLUTIONS[options.resolution])
    width, height = options.size or (width, height)
    return Video(width, height, options.frames, options.steps, options.cfg > 1)


def _sizes(options: argparse.Namespace) -> ModelSizes:
    from lowvram_i2v.checkpoint import open_model
    from lowvram_i2v.sizes import sizes_of
    from lowvram_i2v.synth.headers import model_headers

    if options.model is None:
        return sizes_of(model_headers("full", VARIANTS[options.variant or VARIANT], options.scheme or SCHEME))
    model = open_model(options.model)
    header, flags = model.header, (("--scheme", options.scheme), ("--variant", options.variant))
    if given := " and ".join(f"{flag} {value}" for flag, value in flags if value is not None):
        raise RequestError(
            f"{given} beside --model: {options.model} holds {header.variant.name} weights, stored as {header.scheme}",
            "Leave out --model to plan for the released model, or leave out the others.",
        )
    return sizes_of(model)


def _machine(options: argparse.Namespace, profile: VramProfile) -> Machine:
    """What --vram and --ram leave: CUDA takes its part of the one, the program that would run its part of the other."""
    from lowvram_i2v.host_memory import available_ram
    from lowvram_i2v.plan import GIB, PROCESS_RAM, Machine

    for flag, value in (("--vram", options.vram), ("--ram", options.ram)):
        if value is not None and not 0 < value < 2**20:
            raise RequestError(f"{flag} is {value:g}.", "Give GiB, such as 7.5.")
    ram = available_ram() if options.ram is None else int(options.ram * GIB) - PROCESS_RAM
    if options.vram is None:
        return Machine(None, ram)
    return Machine(max(0, int((options.vram - profile.reserve_gib) * GIB)), ram)
