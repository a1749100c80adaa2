"""The plan of a run: what is resident, how many slots, how large chunks are, and what each phase takes.

Arithmetic on headers and shapes: no weight is read and no GPU is asked. Every number of bytes comes from a function
that stands beside the code which allocates them (`activation_bytes` beside the workspace, `decode_bytes` beside the
decoder, ...); here they are added up and held against the budget.

Invariants: what does not fit is refused here, with need, have and the nearest thing that fits, or never; the prediction
is what torch's allocator reserves at most, within 5 %.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from lowvram_i2v.attention import WRITING
from lowvram_i2v.attention.memory import extra_bytes, gap_bytes, order_bytes
from lowvram_i2v.dit.conditioning import conditioning_bytes, step_bytes
from lowvram_i2v.dit.workspace import Chunking, activation_bytes
from lowvram_i2v.errors import ResourceError
from lowvram_i2v.profile import DECODE_POLICIES, VramProfile
from lowvram_i2v.request import MAX_FRAMES, MAX_SIDE, MIN_FRAMES, SIZE_STEP
from lowvram_i2v.sizes import ELEMENT, ModelSizes
from lowvram_i2v.streaming.block_stream import streamed_places
from lowvram_i2v.streaming.load import host_bytes
from lowvram_i2v.text.streamed import longest_prompt
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.planning import decode_bytes, encode_bytes
from lowvram_i2v.vae.planning import ram_bytes as decode_ram_bytes
from lowvram_i2v.vae.policy import DecodeChunking, policy_of
from lowvram_i2v.vae.route import Shape
from lowvram_i2v.video import AHEAD

GIB, MIB = 2**30, 2**20
ROWS = (4096, 2048, 1024, 512)
"""Tokens of a chunk, best first: matrix products run at full rate from about 4096 rows on."""
FEWEST_HEADS = 4
LIBRARIES = 48 * MIB
"""Work space that the matrix libraries take from torch's allocator, once."""
DECODE_LIBRARIES = 96 * MIB
"""The same in the decoder, where cuDNN works too. Measured: 70 to 120 MiB."""
PAGES = 16 * MIB
"""Of the allocator's pages of 20 MiB, the last is filled in part."""
MARGIN = 80 * MIB
"""Left free beside resident blocks: small tensors, and pages that the allocator holds between tensors."""
FRAGMENTS = 1.12
"""Reserved to allocated bytes where tensors of many sizes come and go, in the image encoder. Measured: 1.10 to 1.14."""
DECODE_AT_MOST = 16 * GIB
"""More does not make the decoder faster."""
DECODE_STEPS = range(64 * MIB, 64 * GIB, 64 * MIB)
"""What is tried to find the least memory that decoding needs."""
PROCESS_RAM = 7 * GIB // 5
"""The program itself: Python, torch, CUDA's libraries."""


@dataclass(frozen=True)
class Machine:
    """What is free now, in bytes. vram: what the allocator can get, None without a GPU. ram: beside the program, which
    runs already; None if unknown. float8: whether the card multiplies 8-bit floats (RTX 40 and later); others keep V in
    16 bits. scores: whether torch's attention writes all scores to memory (before RTX 30)."""

    vram: int | None
    ram: int | None
    float8: bool = True
    scores: bool = False


@dataclass(frozen=True)
class Video:
    """What is to be made. Sides in pixels; cfg: whether each step runs the model twice."""

    width: int
    height: int
    frames: int
    steps: int = 50
    cfg: bool = False

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frames"


@dataclass(frozen=True)
class PhasePlan:
    """Predicted peaks of one phase in bytes: video memory that the allocator reserves, and RAM of the process."""

    name: str
    vram: int
    ram: int


@dataclass(frozen=True)
class DecodePlan:
    """What decoding does with its memory.

    limit: what the allocator may reserve in bytes, None for no limit. reserve: what CUDA takes beside it. decoding: the
    memory that the decoder cuts its work for.
    """

    limit: int | None
    reserve: int
    phases: tuple[PhasePlan, ...]
    decoding: DecodeChunking

    def vram(self, phase: str) -> int:
        """Predicted bytes of a phase."""
        return next(entry.vram for entry in self.phases if entry.name == phase)

    def table(self) -> str:
        """A row for each phase, and the budget."""
        lines = [f"{'phase':14}{'VRAM':>10}{'RAM':>10}"]
        lines += [f"{p.name:14}{p.vram / GIB:6.2f} GiB{p.ram / GIB:6.1f} GiB" for p in self.phases]
        if self.limit is not None:
            lines.append(
                f"budget        {self.limit / GIB:6.2f} GiB beside {self.reserve / GIB:.2f} GiB for CUDA itself"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class MemoryPlan(DecodePlan):
    """What a whole run does with its memory.

    resident: how many of the blocks stay on the device. streamed: bytes that are copied to it in each pass. host: where
    these wait, "pinned" or "mapped".
    """

    resident: int
    blocks: int
    slots: int
    streamed: int
    host: str
    chunking: Chunking

    def table(self) -> str:
        """A row for each phase, and what was chosen."""
        lines = [super().table()]
        where = "RAM" if self.host == "pinned" else "the file"
        streaming = f"{self.streamed / 1e9:.2f} GB a pass from {where} through {self.slots} slots"
        lines.append(
            f"{self.resident} of {self.blocks} blocks stay on the card, {streaming if self.slots else 'none streams'};"
        )
        lines.append(f"chunks of {self.chunking.rows} tokens, attention over {self.chunking.heads} heads at a time")
        return "\n".join(lines)


def make_plan(sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine) -> MemoryPlan:
    """The plan of a run. Raises ResourceError if a phase cannot fit."""
    plan = _best(sizes, video, profile, machine)
    if plan is None:
        raise _out_of_vram(sizes, video, profile, machine)
    worst = max(plan.phases, key=lambda phase: phase.ram)
    if not _in_ram(worst, machine):
        raise ResourceError(_ram_missing(worst, video, machine), _way_out(sizes, video, profile, machine))
    return plan


def plan_decode(vae: VaeConfig, video: Video, profile: VramProfile, machine: Machine) -> DecodePlan:
    """The plan of decoding finished latents, which asks for nothing but the VAE. Raises ResourceError if that cannot
    fit."""
    if not _decodes(vae, video, profile, machine):
        raise _decoding_refused(vae, video, profile, machine)
    limit = limit_of(profile, machine)
    phase = _decode_phase(vae, video, profile, limit)
    return DecodePlan(limit, int(profile.reserve_gib * GIB), (phase,), decoding_of(limit))


def fits(sizes: ModelSizes, video: Video, *, profile: VramProfile, machine: Machine) -> bool:
    """Whether `make_plan` has a plan for this video."""
    plan = _best(sizes, video, profile, machine)
    return plan is not None and all(_in_ram(phase, machine) for phase in plan.phases)


def limit_of(profile: VramProfile, machine: Machine) -> int | None:
    """Bytes that the allocator may reserve: the profile's, less what CUDA takes, and never more than is free."""
    limits = [] if machine.vram is None else [machine.vram]
    if profile.vram_gib:
        limits.append(int((profile.vram_gib - profile.reserve_gib) * GIB))
    return min(limits, default=None)


def _best(sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine) -> MemoryPlan | None:
    """The fastest plan below the limit: the largest chunks, then as many resident blocks as fit. None if none fits."""
    limit = limit_of(profile, machine)
    others = _other_phases(sizes, video, profile, limit)
    if limit is not None and any(phase.vram > limit for phase in others.values()):
        return None
    for chunking in chunkings(sizes.transformer.heads):
        resident = _most_resident(sizes, video, profile, machine, chunking)
        if resident is not None:
            return _plan(sizes, video, profile, machine, chunking, resident, others)
    return None


def chunkings(heads: int) -> list[Chunking]:
    """Ways to cut the work, the fastest first. The first is for who has memory to spare."""
    groups = [n for n in range(heads, 0, -1) if heads % n == 0 and (n >= FEWEST_HEADS or n == heads)]
    return [Chunking(ROWS[0], heads) for heads in groups] + [Chunking(rows, groups[-1]) for rows in ROWS[1:]]


def _most_resident(
    sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine, chunking: Chunking
) -> int | None:
    """How many blocks can stay on the device; None if not even slots for streaming fit."""
    blocks, limit = len(sizes.slabs), limit_of(profile, machine)
    wanted = blocks if profile.resident_blocks < 0 else min(profile.resident_blocks, blocks)
    room = math.inf if limit is None else limit - _work_bytes(sizes, video, profile, machine, chunking) - MARGIN
    for resident in range(wanted, -1, -1):
        if _block_bytes(sizes, profile, resident) <= room:
            return resident
    return None


def _plan(
    sizes: ModelSizes,
    video: Video,
    profile: VramProfile,
    machine: Machine,
    chunking: Chunking,
    resident: int,
    others: dict[str, PhasePlan],
) -> MemoryPlan:
    places, host = streamed_places(len(sizes.slabs), resident, profile.slots), profile.host
    if host == "auto":
        fitting = machine.ram is None or host_bytes(sizes.slabs, places, "pinned") <= machine.ram
        host = "pinned" if fitting else "mapped"
    denoise = PhasePlan(
        "denoise",
        _denoise_bytes(sizes, video, profile, machine, chunking, resident),
        PROCESS_RAM + host_bytes(sizes.slabs, places, host),
    )
    limit = limit_of(profile, machine)
    order = ("text", "pooled text", "image", "conditioning", "denoise", "decode")
    return MemoryPlan(
        limit=limit,
        reserve=int(profile.reserve_gib * GIB),
        phases=tuple(denoise if name == "denoise" else others[name] for name in order),
        resident=len(sizes.slabs) - len(places),
        blocks=len(sizes.slabs),
        slots=profile.slots if places else 0,
        streamed=sum(sizes.slabs[place] for place in places),
        host=host,
        chunking=chunking,
        decoding=decoding_of(limit),
    )


def decoding_of(limit: int | None) -> DecodeChunking:
    """Memory for the decoder: what the allocator may reserve, less what libraries take."""
    if limit is None:
        return DecodeChunking()
    return DecodeChunking(device_bytes=min(limit - DECODE_LIBRARIES, DECODE_AT_MOST))


def _denoise_bytes(
    sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine, chunking: Chunking, resident: int
) -> int:
    return _block_bytes(sizes, profile, resident) + _work_bytes(sizes, video, profile, machine, chunking)


def _block_bytes(sizes: ModelSizes, profile: VramProfile, resident: int) -> int:
    """Resident blocks and slots."""
    places = set(streamed_places(len(sizes.slabs), resident, profile.slots))
    staying = sum(size for place, size in enumerate(sizes.slabs) if place not in places)
    return staying + profile.slots * max((sizes.slabs[place] for place in places), default=0)


def _work_bytes(sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine, chunking: Chunking) -> int:
    """Weights outside the blocks, inputs, and what a step allocates."""
    image, text = tokens(sizes, video)
    activations = activation_bytes(
        sizes.transformer,
        image,
        text,
        chunking,
        scheme=sizes.scheme,
        compute=profile.compute,
        element=ELEMENT,
        attention=_attention_bytes(sizes, video, profile, machine, chunking),
        attention_writes=profile.attention in WRITING,
    )
    order = order_bytes(image, math.prod(sizes.transformer.patch_size), sizes.transformer.in_channels)
    inputs = _input_bytes(sizes, video) + (order if profile.attention == "triton-sparse" else 0)
    return LIBRARIES + PAGES + sizes.loop + inputs + activations


def _attention_bytes(
    sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine, chunking: Chunking
) -> int:
    """What one attention call takes beside its result."""
    config, (image, text) = sizes.transformer, tokens(sizes, video)
    work = image // latent_frames(sizes.vae, video), image, text, chunking.heads, config.head_dim
    density, value = profile.sparse_density, 1 if machine.float8 else 2
    taken = extra_bytes(profile.attention, *work, density=density, value=value, scores=machine.scores)
    return taken + (gap_bytes(*work, density=density) if profile.attention == "triton-sparse" else 0)


def _input_bytes(sizes: ModelSizes, video: Video) -> int:
    """Float32 latents and rotary tables, the model's further input channels, one step's conditioning."""
    config = sizes.transformer
    image, text = tokens(sizes, video)
    latents = 4 * image * 4 * config.out_channels  # 2 x 2 latents a token
    further = 0 if config.replaces_first_frame else latents * config.in_channels // config.out_channels
    guided = latents if video.cfg else 0
    rope = 2 * 4 * image * config.head_dim // 2
    return latents + further + guided + rope + step_bytes(config, text, ELEMENT)


def latent_frames(vae: VaeConfig, video: Video) -> int:
    """Frames of the latents: the first, and one for each four that follow it."""
    return (video.frames - 1) // vae.time_ratio + 1


def tokens(sizes: ModelSizes, video: Video) -> tuple[int, int]:
    """Image tokens of the video, and text tokens of the longest prompt."""
    frames = latent_frames(sizes.vae, video)
    side = sizes.vae.spatial_ratio * sizes.transformer.patch_size[1]
    image = frames * (video.height // side) * (video.width // side)
    return image, longest_prompt(sizes.text_encoder, sizes.variant.image_row_stride)


def _other_phases(sizes: ModelSizes, video: Video, profile: VramProfile, limit: int | None) -> dict[str, PhasePlan]:
    """All phases but the loop: nothing in them depends on resident blocks or chunks of it."""
    text = tokens(sizes, video)[1]
    text_vram, text_ram = sizes.text_phase
    conditioning = conditioning_bytes(
        sizes.transformer, video.steps, text, video.cfg, max(sizes.modulation), ELEMENT, sizes.scheme
    )
    hoisted = video.steps * (2 if video.cfg else 1) * step_bytes(sizes.transformer, text, ELEMENT)
    ring = host_bytes(sizes.modulation, list(range(len(sizes.modulation))), "mapped")
    phases = (
        PhasePlan("text", LIBRARIES + text_vram, PROCESS_RAM + text_ram),
        PhasePlan("pooled text", LIBRARIES + sizes.clip, PROCESS_RAM),
        PhasePlan("image", LIBRARIES + _encode_bytes(sizes.vae, video), PROCESS_RAM),
        PhasePlan("conditioning", LIBRARIES + sizes.before + conditioning, PROCESS_RAM + hoisted + ring),
        _decode_phase(sizes.vae, video, profile, limit),
    )
    return {phase.name: phase for phase in phases}


def _encode_bytes(vae: VaeConfig, video: Video) -> int:
    """With the copies of input and output, channels last, that cuDNN makes for the widest convolutions."""
    copies = 2 * vae.block_out_channels[0] * video.width * video.height * ELEMENT
    return int(FRAGMENTS * (encode_bytes(vae, video.width, video.height, ELEMENT) + copies))


def _decode_phase(vae: VaeConfig, video: Video, profile: VramProfile, limit: int | None) -> PhasePlan:
    """Where no chunk is small enough: what there is and a little more."""
    chunking = decoding_of(limit)
    vram, ram = _decode_bytes(vae, video, profile, chunking) or (chunking.device_bytes + LIBRARIES, 0)
    return PhasePlan("decode", DECODE_LIBRARIES + vram, PROCESS_RAM + ram)


def _decode_bytes(
    vae: VaeConfig, video: Video, profile: VramProfile, chunking: DecodeChunking
) -> tuple[int, int] | None:
    """Video memory and RAM of decoding; None where no chunk is small enough."""
    ratio = vae.spatial_ratio
    latent = Shape(latent_frames(vae, video), video.height // ratio, video.width // ratio)
    arguments = vae, latent, policy_of(profile.decode), chunking, ELEMENT
    try:
        return decode_bytes(*arguments), decode_ram_bytes(*arguments, waiting=AHEAD)
    except ResourceError:
        return None


def _decodes(vae: VaeConfig, video: Video, profile: VramProfile, machine: Machine) -> bool:
    """Whether finished latents can be decoded."""
    limit = limit_of(profile, machine)
    phase = _decode_phase(vae, video, profile, limit)
    return (limit is None or phase.vram <= limit) and _in_ram(phase, machine)


def _decoding_refused(vae: VaeConfig, video: Video, profile: VramProfile, machine: Machine) -> ResourceError:
    """What is missing, and what could be decoded: these latents in another way, not another video."""
    limit = limit_of(profile, machine)
    changes = {f"--policy {policy}": replace(profile, decode=policy) for policy in DECODE_POLICIES}
    changes["--profile auto, which takes all that is free"] = replace(profile, vram_gib=0.0)
    ways = [words for words, changed in changes.items() if _decodes(vae, video, changed, machine)]
    fitting = f"What fits: {', or '.join(ways)}."
    phase = _decode_phase(vae, video, profile, limit)
    if limit is None or phase.vram <= limit:
        return ResourceError(_ram_missing(phase, video, machine), fitting if ways else "Close other programs.")
    least = bisect_left(
        DECODE_STEPS, True, key=lambda n: _decode_bytes(vae, video, profile, DecodeChunking(n)) is not None
    )
    need = DECODE_LIBRARIES + DECODE_STEPS[min(least, len(DECODE_STEPS) - 1)]
    return ResourceError(
        _vram_missing("decode", need, video, profile, limit),
        fitting if ways else "Close programs that use the card, or decode without it: --device cpu.",
    )


def _in_ram(phase: PhasePlan, machine: Machine) -> bool:
    return machine.ram is None or phase.ram <= machine.ram + PROCESS_RAM


def _ram_missing(phase: PhasePlan, video: Video, machine: Machine) -> str:
    assert machine.ram is not None
    return (
        f"{video}: {phase.name} needs {phase.ram / GIB:.2f} GiB of RAM, the program's own {PROCESS_RAM / GIB:.2f} GiB "
        f"included, and can have {(machine.ram + PROCESS_RAM) / GIB:.2f} GiB"
    )


def _vram_missing(phase: str, need: int, video: Video, profile: VramProfile, limit: int) -> str:
    return (
        f"{video}: {phase} needs {need / GIB:.2f} GiB of video memory, and profile {profile.name} has "
        f"{limit / GIB:.2f} GiB beside what CUDA takes"
    )


def _out_of_vram(sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine) -> ResourceError:
    """What does not fit, what it needs at least, what there is, and the nearest video that fits."""
    limit = limit_of(profile, machine)
    assert limit is not None
    phases = list(_other_phases(sizes, video, profile, limit).values())
    smallest = chunkings(sizes.transformer.heads)[-1]
    phases.append(PhasePlan("denoise", _denoise_bytes(sizes, video, profile, machine, smallest, 0) + MARGIN, 0))
    worst = max(phases, key=lambda phase: phase.vram)
    return ResourceError(
        _vram_missing(worst.name, worst.vram, video, profile, limit), _way_out(sizes, video, profile, machine)
    )


def _way_out(sizes: ModelSizes, video: Video, profile: VramProfile, machine: Machine) -> str:
    """The nearest that fits: each way changes one thing of the profile or the video."""
    changes = {
        'host = "auto" in the profile, which reads blocks from the file': replace(profile, host="auto"),
        'decode = "reference" in the profile, which keeps less of the video': replace(profile, decode="reference"),
    }
    ways = [words for words, changed in changes.items() if fits(sizes, video, profile=changed, machine=machine)]
    fitting = partial(fits, sizes, profile=profile, machine=machine)
    if frames := most_frames(video, fitting):
        ways.append(f"--frames {frames} at this size")
    if size := largest_size(video, fitting):
        ways.append(f"--size {size[0]}x{size[1]} with {video.frames} frames")
    if steps := most_steps(video, fitting):
        ways.append(f"--steps {steps}")
    if ways:
        return f"What fits: {', or '.join(ways)}."
    smallest = replace(video, width=SIZE_STEP, height=SIZE_STEP, frames=MIN_FRAMES, steps=1)
    if fitting(smallest):
        return "A smaller size, fewer frames or fewer steps alone do not fit; together they do."
    if fits(sizes, smallest, profile=profile, machine=replace(machine, ram=None)):
        return "Nothing fits there: the RAM is too little for any video. Close other programs."
    return "Nothing fits there: the model's own weights do not."


def most_frames(video: Video, fitting: Callable[[Video], bool]) -> int | None:
    """The largest number of frames, 4n + 1, that fits at the video's size; None if none does."""
    counts = range(MIN_FRAMES, MAX_FRAMES + 1, 4)
    return _last(counts, lambda frames: fitting(replace(video, frames=frames)))


def most_steps(video: Video, fitting: Callable[[Video], bool]) -> int | None:
    """The largest number of steps, up to the video's, that fits; None if none does."""
    return _last(range(1, video.steps + 1), lambda steps: fitting(replace(video, steps=steps)))


def largest_size(video: Video, fitting: Callable[[Video], bool]) -> tuple[int, int] | None:
    """The largest (width, height) of about the video's ratio that fits with its frames; None if none does."""
    longer = max(video.width, video.height)

    def scaled(side: int) -> tuple[int, int]:
        width, height = (round(x * side / longer / SIZE_STEP) * SIZE_STEP for x in (video.width, video.height))
        return max(width, SIZE_STEP), max(height, SIZE_STEP)

    def fits_scaled(side: int) -> bool:
        width, height = scaled(side)
        return fitting(replace(video, width=width, height=height))

    side = _last(range(SIZE_STEP, MAX_SIDE + 1, SIZE_STEP), fits_scaled)
    return None if side is None else scaled(side)


def _last(values: range, fitting: Callable[[int], bool]) -> int | None:
    """The last of the values that fits, if those that fit come first; None if the first does not."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fitting(values[middle]) else (low, middle)
    return values[low - 1] if low else None
