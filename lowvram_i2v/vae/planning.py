"""Which route a latent takes in a given memory, and how much that route takes. Arithmetic on shapes; no torch here.

The tensor between two stages is kept if it fits: on the device first, then in host memory. Where a resnet's branch does
not fit beside its trunk, the resnet is one segment, and its first convolution runs twice. Where a trunk does not fit at
all, the route ends in one long segment, the tail. A segment's chunks are as large as the rest of the device's memory
allows, because every band reads rows twice and every chunk copies two frames.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.policy import DecodeChunking, Policy
from lowvram_i2v.vae.route import OUT_CHANNELS, Rows, Segment, Shape, Stage, bands, rows_through, spans, stages

TAPS = 27  # of a 3x3x3 convolution
LARGEST = 2**31 - 1  # elements of a segment's chunks: some kernels count in 32 bits
NORMED_AT_ONCE = 8  # parts in which the image encoder normalizes, each in float32
WRITING = 0.1  # what writing a value of the padded input costs, in convolutions of it
WORTH = 1.5  # how much more work small chunks may make before a tensor is rather not kept on the device


def decode_bytes(config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int) -> int:
    """The most bytes on the device while a latent of this shape is decoded, weights included.

    element: bytes of a number: 2 in float16. Raises ResourceError if `chunking` allows too few.
    """
    shape, borders = latent, 0
    if policy.moments == "tile":
        shape, borders = largest_tile(config, latent), border_bytes(config, latent)
    return borders + max(step.device_bytes for step in walk(config, shape, policy, chunking, element))


def host_bytes(config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int) -> int:
    """The most bytes in page-locked host memory."""
    shape = largest_tile(config, latent) if policy.moments == "tile" else latent
    return max(step.host_bytes for step in walk(config, shape, policy, chunking, element))


def encode_bytes(config: VaeConfig, width: int, height: int, element: int) -> int:
    """The most bytes on the device while `ImageEncoder` encodes a picture of width x height pixels, weights included.

    The widest resnets are those of the first two blocks: input, padded tensor and result, and float32 parts.
    """
    most = 0
    for index, channels in enumerate(config.block_out_channels):
        high, wide = height >> min(index, 3), width >> min(index, 3)
        plane, padded = channels * high * wide, channels * (high + 2) * (wide + 2)
        part = max(1, config.norm_num_groups // NORMED_AT_ONCE) * channels // config.norm_num_groups * high * wide
        most = max(most, (2 * plane + padded) * element + 2 * part * max(4, element))
    return encoder_weight_bytes(config, element) + 3 * width * height * max(4, element) + most


def encoder_weight_bytes(config: VaeConfig, element: int) -> int:
    """The encoder's weights, each 3-D convolution's summed over time but the largest."""
    widths = config.block_out_channels
    total, last = config.in_channels * 9 * widths[0] + widths[0], widths[0]
    for index, width in enumerate(widths):
        for inputs in [last, *[width] * (config.layers_per_block - 1)]:
            total += _resnet_values(inputs, width)
        total += width * (9 * width + 1) if index < len(widths) - 1 else 0
        last = width
    total += 2 * _resnet_values(last, last) + 4 * last * (last + 1) + 2 * last
    latents = 2 * config.latent_channels
    return (total + 2 * last + latents * (9 * last + 1) + latents * (latents + 1)) * element


def _resnet_values(inputs: int, outputs: int) -> int:
    shortcut = outputs * (inputs + 1) if inputs != outputs else 0
    return 2 * inputs + 2 * outputs + outputs * (9 * inputs + 1) + outputs * (9 * outputs + 1) + shortcut


def plan_route(
    config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int
) -> tuple[Segment, ...]:
    """The route of one clip, or of one tile where moments are a tile's. Raises ResourceError as `decode_bytes`."""
    return tuple(step.segment for step in walk(config, latent, policy, chunking, element))


def largest_tile(config: VaeConfig, latent: Shape) -> Shape:
    """In latents."""
    tile, frames = config.sample_size // config.spatial_ratio, config.sample_tsize // config.time_ratio
    frames = latent.frames if latent.frames <= frames else frames + 1
    return Shape(frames, min(latent.height, tile), min(latent.width, tile))


def border_bytes(config: VaeConfig, latent: Shape) -> int:
    """Float32 borders of finished tiles that stay on the device: a row's, below and of one tile to the right."""
    tile = largest_tile(config, latent)
    if tile.height == latent.height and tile.width == latent.width:
        return 0
    frames = (tile.frames - 1) * config.time_ratio + 1
    lines = round(config.sample_size * config.tile_overlap_factor)
    columns = -(-latent.width // round(config.sample_size // config.spatial_ratio * (1 - config.tile_overlap_factor)))
    high, wide = tile.height * config.spatial_ratio, tile.width * config.spatial_ratio
    return 4 * config.out_channels * frames * lines * ((columns + 1) * wide + high)


@dataclass(frozen=True)
class Step:
    """A segment and the bytes that are taken while it runs."""

    segment: Segment
    device_bytes: int
    host_bytes: int


def weight_bytes(config: VaeConfig, element: int) -> int:
    """The decoder's weights and the upsamplers' phases."""
    total = config.latent_channels * (config.latent_channels + 1)
    for stage in stages(config):
        inputs, outputs = stage.inputs, stage.outputs
        if stage.kind == "attend":
            total += 4 * inputs * (inputs + 1) + 2 * inputs
            continue
        total += outputs * (TAPS * inputs + 1) + (2 * inputs if stage.kind in ("first", "second", "out") else 0)
        if stage.kind == "up":
            total += outputs * inputs * 4 * 4 * (stage.time * 2 if stage.time > 1 else 3)
        if stage.kind == "out":
            total += OUT_CHANNELS * (TAPS * inputs + 1)
        if stage.narrows:
            total += outputs * (inputs + 1)
    return total * element


@dataclass
class _Kept:
    """A kept tensor's bytes, by place."""

    device: int = 0
    host: int = 0

    @classmethod
    def at(cls, place: str, size: int) -> _Kept:
        return cls(**{place: size}) if place else cls()


def walk(config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int) -> Iterator[Step]:
    """The segments of a route, in order, each with what is taken while it runs."""
    walker = _Walker(config, latent, policy, chunking, element)
    while walker.index < len(walker.stages):
        yield walker.advance()


class _Walker:
    """What is kept before stage `index`."""

    def __init__(
        self, config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int
    ) -> None:
        self.stages, self.index, self.shape = stages(config), 0, latent
        self.trunk = _Kept(device=latent.positions * config.latent_channels * element)
        self.branch, self.spent = _Kept(), _Kept()
        self._policy, self._chunking, self._element = policy, chunking, element
        self._weights = weight_bytes(config, element)
        video = latent
        for stage in self.stages:
            video = stage.shape(video)
        self._video = 0 if policy.moments == "tile" else video.positions * config.out_channels * element

    def advance(self) -> Step:
        """The next segment: the first choice that fits without making much more work, or else that fits at all."""
        choices = list(self._choices())
        for worth in (WORTH, float("inf")):
            for segment in choices:
                step = self._fitted(segment, worth)
                if step is not None:
                    self._take(step.segment)
                    return step
        raise ResourceError(
            f"decoding {self.shape.frames} frames of {self.shape.width}x{self.shape.height} values at stage "
            f"{self.index} does not fit in {self._chunking.device_bytes / 2**30:.2f} GiB of video memory and "
            f"{self._chunking.host_bytes / 2**30:.2f} GiB of RAM",
            "Allow more memory, or decode a smaller or shorter video.",
        )

    def _choices(self) -> Iterator[Segment]:
        """Best first: short segments, kept on the device; then on the host; then a resnet at once; then the tail.
        Where each tile takes the way, copying it to the host and back costs more than a convolution done twice."""
        first, kind = self.index, self.stages[self.index].kind
        tiles = self._policy.moments == "tile"
        if kind == "out":
            yield Segment(first, first + 1, 1, 1, trunk="device" if tiles else "host")
        elif kind in ("attend", "second"):
            yield Segment(first, first + 1, 1, 1)
        else:
            half, whole = list(self._halves()), list(self._wholes())
            on_device = [s for s in half if "host" not in (s.trunk, s.branch)]
            yield from (*on_device, *whole, *half) if tiles else (*half, *whole)
            yield Segment(
                first,
                len(self.stages),
                1,
                1,
                trunk="device" if tiles else "host",
                measures=None if tiles else self._policy.measures,
            )

    def _halves(self) -> Iterator[Segment]:
        """Up to the next tensors that can be kept: `in` or `up` alone, or the first half of a resnet with its branch.
        An upsampled tensor that the next stage narrows is never kept: it is the largest of all."""
        first, stage = self.index, self.stages[self.index]
        if stage.kind == "in" or (stage.kind == "up" and not self.stages[first + 1].narrows):
            for place in ("device", "host"):
                yield Segment(first, first + 1, 1, 1, trunk=place, spare=self._spare(first + 1))
            return
        last = first + (2 if stage.kind == "up" else 1)
        new_trunk = self.stages[last - 1].narrows
        for trunk in ("device", "host") if new_trunk else ("",):
            for branch in ("device", "host"):
                yield Segment(first, last, 1, 1, trunk=trunk, branch=branch, spare=self._spare(last) if trunk else 0)

    def _wholes(self) -> Iterator[Segment]:
        """A whole resnet, with the upsampling before it if that is not kept; written over its input if it can be."""
        first, stage = self.index, self.stages[self.index]
        last = first + (3 if stage.kind == "up" else 2)
        if stage.kind == "in" or self.stages[last - 1].kind != "second":
            return
        if stage.kind == "first" and not stage.narrows:
            yield Segment(first, last, 1, 1)
            return
        for place in ("device", "host"):
            yield Segment(first, last, 1, 1, trunk=place, spare=self._spare(last))

    def _spare(self, index: int) -> int:
        """Rows that the resnets before the next upsampling would need to be written in place, each as a whole."""
        kinds = [stage.kind for stage in self.stages[index:]]
        until = next((place for place, kind in enumerate(kinds) if kind in ("up", "out")), len(kinds))
        return 2 * kinds[:until].count("first")

    def _fitted(self, segment: Segment, worth: float) -> Step | None:
        """The segment with the best chunks that fit beside what is kept meanwhile."""
        part = self.stages[segment.first : segment.last]
        trunk, branch = self._made(segment)
        kept = [self.trunk, self.branch, trunk, branch]
        if part[-1].kind == "first" and self._reuses(segment):
            kept[3] = self.spent
        video = 0 if part[-1].kind == "out" else self._video  # whatever is kept now, the frames must fit at the end
        host = sum(store.host for store in kept) + video
        if host > self._chunking.host_bytes:
            return None
        held = self._weights + sum(store.device for store in kept)
        room = self._chunking.device_bytes - held
        if part[0].kind == "attend":
            work = _attention_elements(self.shape, part[0].inputs) * self._element
            return Step(segment, held + work, host) if work <= room else None
        room = min(room // self._element, LARGEST)
        chunked = _best_chunks(part, self.shape, segment, self._chunking.frames, room, self._from_host)
        if chunked is None or chunked[1] > worth:
            return None
        best = chunked[0]
        work = working_elements(part, self.shape, best, self._from_host) * self._element
        if part[0].kind == "in":  # what is kept now is there when the attention comes
            work = max(work, _attention_elements(self.shape, part[0].outputs) * self._element)
        return Step(best, held + work, host) if held + work <= self._chunking.device_bytes else None

    @property
    def _from_host(self) -> tuple[bool, bool]:
        return self.trunk.host > 0, self.branch.host > 0

    def _made(self, segment: Segment) -> tuple[_Kept, _Kept]:
        """New trunk and branch."""
        shape, last = self._after(segment), self.stages[segment.last - 1]
        wide = shape.width * last.outputs * self._element
        size = shape.frames * shape.height * wide
        trunk = _Kept.at(segment.trunk, size + segment.spare * shape.frames * wide)
        return trunk, _Kept.at(segment.branch, size) if last.kind == "first" else _Kept()

    def _after(self, segment: Segment) -> Shape:
        shape = self.shape
        for stage in self.stages[segment.first : segment.last]:
            shape = stage.shape(shape)
        return shape

    def _reuses(self, segment: Segment) -> bool:
        """Whether the branch takes the memory of the last one. Then its own place does not matter."""
        _, branch = self._made(segment)
        return self.spent != _Kept() and self.spent.device + self.spent.host == branch.device + branch.host

    def _take(self, segment: Segment) -> None:
        """What is kept after the segment."""
        part = self.stages[segment.first : segment.last]
        trunk, branch = self._made(segment)
        if part[-1].kind == "first":
            self.branch, self.spent = (self.spent if self._reuses(segment) else branch), _Kept()
        else:
            self.spent, self.branch = self.branch, _Kept()
        self.trunk = trunk if segment.trunk else self.trunk
        self.shape, self.index = self._after(segment), segment.last


def _best_chunks(
    part: Sequence[Stage], before: Shape, segment: Segment, most: int, room: int, from_host: tuple[bool, bool]
) -> tuple[Segment, float] | None:
    """The chunks that fit in `room` elements and make the least work, and how many times the least work it is."""
    height = before.height * prod(stage.space for stage in part)
    best: tuple[Segment, float] | None = None
    frames = most
    while frames:
        chunked = replace(segment, frames=min(frames, before.frames))
        count = bisect_left(
            range(1, height + 1),
            True,
            key=lambda count: working_elements(part, before, _in_bands(chunked, height, count), from_host) <= room,
        )
        if count < height:
            chunked = _in_bands(chunked, height, count + 1)
            work = _work(part, before, chunked)
            best = (chunked, work) if best is None or work < best[1] else best
        frames //= 2
    return best


def _in_bands(segment: Segment, height: int, count: int) -> Segment:
    return replace(segment, rows=-(-height // count))


def _work(part: Sequence[Stage], before: Shape, segment: Segment) -> float:
    """Work in relation to that of one chunk: rows that are convolved twice, and past frames and rows at the border that
    are only written again."""
    height = before.height * prod(stage.space for stage in part)
    cores = bands(height, segment.rows)
    core = cores[len(cores) // 2]
    rows, frames = core[1] - core[0], segment.frames * prod(stage.time for stage in part)
    made = rows_through(part, core, before)[1:]
    convolved = sum((last - first) * stage.inputs for stage, (first, last) in zip(part, made, strict=True))
    return convolved / (rows * sum(stage.inputs for stage in part)) * (1 + WRITING * (2 / frames + 2 / rows))


def _attention_elements(shape: Shape, channels: int) -> int:
    """Keys and values of all frames, and of one frame: tokens in float32 and cast, query, result, projection."""
    return (2 * shape.positions + 8 * shape.height * shape.width) * channels


def working_elements(part: Sequence[Stage], before: Shape, segment: Segment, from_host: tuple[bool, bool]) -> int:
    """The most elements that a segment's chunks take beside the kept tensors: what is carried along, buffers for
    copies, and a stage's input, padded input and output."""
    height = before.height * prod(stage.space for stage in part)
    frames = max(last - first for first, last in spans(before.frames, segment.frames))
    cores = bands(height, segment.rows)
    return max(
        _band_elements(part, before, segment, from_host, frames, core)
        for core in {cores[0], cores[len(cores) // 2], cores[-1]}
    )


def _band_elements(
    part: Sequence[Stage], before: Shape, segment: Segment, from_host: tuple[bool, bool], frames: int, core: Rows
) -> int:
    rows, shape = rows_through(part, core, before)[0], before
    read = frames * (rows[1] - rows[0]) * shape.width * part[0].inputs
    copies = 2 * read * sum(from_host)
    state, branch = 0, 0  # elements of what a stage gets, beside windows into kept tensors
    carried, peak = 0, 0
    steps: list[tuple[int, int]] = []  # (carried by this stage, most that it takes beside all that is carried)
    for stage in part:
        padded_rows = rows[1] - rows[0] + (rows[0] == 0) + (rows[1] == shape.height)
        line = (shape.width + 2) * stage.inputs
        carry, padded = stage.past * padded_rows * line, (stage.past + frames) * padded_rows * line
        made = stage.rows_made(rows, shape.height)
        after = stage.shape(shape)
        if stage.kind == "up":
            phases = frames * (padded_rows - 1) * (shape.width + 1) * 4 * stage.time * stage.outputs
            out = frames * stage.time * (made[1] - made[0]) * after.width * stage.outputs
            most = max(padded + phases, phases + out)
            frames *= stage.time
        else:
            outputs = OUT_CHANNELS if stage.kind == "out" else stage.outputs
            out = frames * (made[1] - made[0]) * shape.width * outputs
            most = padded + out
        trunk = state
        if stage.narrows:
            trunk = frames * (rows[1] - rows[0]) * shape.width * stage.outputs
            most = max(most, out + trunk)
        steps.append((carry, state + branch + most))
        state, branch = (trunk, out) if stage.kind == "first" else (out, 0)
        rows, shape = made, after
    carried = sum(carry for carry, _ in steps)
    peak = max(most for _, most in steps)
    sent = 2 * out if "host" in (segment.trunk, segment.branch) else 0
    return carried + peak + copies + sent
