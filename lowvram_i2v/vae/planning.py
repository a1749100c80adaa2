"""Which route a latent takes in a given memory, and how much that route takes. Arithmetic on shapes; no torch here.

The tensor between two stages is kept if it fits: on the device first, then in host memory. Where a resnet's branch does
not fit beside its trunk, the resnet is one segment, and its first convolution runs twice. Where a trunk does not fit at
all, the route ends in one long segment, the tail. A segment's chunks are as large as the rest of the device's memory
allows, because every band reads rows twice and every chunk copies two frames.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.layout import AttentionLayout, Ends, Layout, OnHost, Place, aligned, attention_layout, chunk_layout
from lowvram_i2v.vae.policy import DecodeChunking, Policy
from lowvram_i2v.vae.route import OUT_CHANNELS, Segment, Shape, Stage, bands, rows_through, stages

TAPS = 27  # of a 3x3x3 convolution
LARGEST = 2**31 - 1  # elements of a segment's chunks: some kernels count in 32 bits
NORMED_AT_ONCE = 8  # parts in which the image encoder normalizes, each in float32
MIXED = 3  # borders at a time that mixing makes: two faded ones, and a finished part on its way to the host
SMALL = 2**15  # bytes a channel, of the most: parts of a chunk's moments
WRITING = 0.1  # what writing a value of the padded input costs, in convolutions of it
LANDING = 3  # buffers for parts of tiles on their way to the host
WORTH = 1.5  # how much more work small chunks may make before a tensor is rather not kept on the device


def decode_bytes(config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int) -> int:
    """The most bytes on the device while a latent of this shape is decoded, weights included.

    element: bytes of a number: 2 in float16. Raises ResourceError if `chunking` allows too few.
    """
    if policy.moments == "tile":
        return blending_bytes(config, latent) + tile_chunking(config, latent, policy, chunking, element).device_bytes
    return max(step.device_bytes for step in plan_route(config, latent, policy, chunking, element))


def host_bytes(config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int) -> int:
    """The most bytes in page-locked host memory."""
    shape = latent
    if policy.moments == "tile":
        shape, chunking = largest_tile(config, latent), tile_chunking(config, latent, policy, chunking, element)
    return max(step.host_bytes for step in plan_route(config, shape, policy, chunking, element))


def ram_bytes(
    config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int, waiting: int
) -> int:
    """The most bytes of RAM: page-locked ones, and finished frames in float32, of which `waiting` wait to be encoded.

    Of tiles, the picture of one time is encoded while that of the next comes together, and is mixed with a border.
    """
    locked = host_bytes(config, latent, policy, chunking, element)
    frames = (latent.frames - 1) * config.time_ratio + 1
    frame = 4 * config.out_channels * latent.height * latent.width * config.spatial_ratio**2
    if policy.moments == "global":  # the decoder's own memory is given back when frames begin to leave
        return max(locked, (element * frames + 4 * min(waiting, frames)) * frame // 4)
    tile = largest_tile(config, latent)
    time = (tile.frames - 1) * config.time_ratio + 1
    part = 4 * config.out_channels * time * tile.height * tile.width * config.spatial_ratio**2
    fading = round(config.sample_tsize * config.tile_overlap_factor)
    return locked + LANDING * part + frame * (time if frames == time else 2 * (time + fading))


def tile_chunking(
    config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int
) -> DecodeChunking:
    """What each tile may take: what the largest does. The rest is for blending."""
    room = replace(chunking, device_bytes=chunking.device_bytes - blending_bytes(config, latent))
    most = max(step.device_bytes for step in plan_route(config, largest_tile(config, latent), policy, room, element))
    return replace(room, device_bytes=most)


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


@lru_cache(maxsize=64)  # of bytes on the device, of bytes on the host and of the decoder itself
def plan_route(
    config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int
) -> tuple[Step, ...]:
    """The route of one clip, or of one tile where moments are a tile's. Raises ResourceError as `decode_bytes`.

    Little memory of one kind can make the result less exact, with `policy.measures`: what neither the device nor
    `host_bytes` holds joins the tail, whose norms are measured all at once. A 720p clip of 129 frames in 2 GiB and
    8 GiB of RAM has a longer tail than in 3 GiB.
    """
    return tuple(walk(config, latent, policy, chunking, element))


def video_bytes(route: Sequence[Step]) -> int:
    """Of `host_bytes`, what the finished frames take."""
    last = route[-1].trunk
    return last.place.size if last is not None and last.memory == "video" else 0


def largest_tile(config: VaeConfig, latent: Shape) -> Shape:
    """In latents."""
    tile, frames = config.sample_size // config.spatial_ratio, config.sample_tsize // config.time_ratio
    frames = latent.frames if latent.frames <= frames else frames + 1
    return Shape(frames, min(latent.height, tile), min(latent.width, tile))


def blending_bytes(config: VaeConfig, latent: Shape) -> int:
    """Float32 on the device beside the decoder's: borders of finished tiles, a row's below and one tile's to the right,
    and what mixing two of them takes. The tile itself lies in memory that the decoder has."""
    tile = largest_tile(config, latent)
    if tile.height == latent.height and tile.width == latent.width:
        return 0
    frames = (tile.frames - 1) * config.time_ratio + 1
    lines = round(config.sample_size * config.tile_overlap_factor)
    columns = -(-latent.width // round(config.sample_size // config.spatial_ratio * (1 - config.tile_overlap_factor)))
    high, wide = tile.height * config.spatial_ratio, tile.width * config.spatial_ratio
    return 4 * config.out_channels * frames * lines * ((columns + 1 + MIXED) * wide + high)


def fixed_bytes(config: VaeConfig, latent: Shape, element: int) -> int:
    """Weights, the latent as it came and after its first convolution, moments and scales."""
    inputs = latent.positions * config.latent_channels * (4 + element)
    return weight_bytes(config, element) + inputs + SMALL * max(config.block_out_channels)


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


@dataclass(frozen=True)
class Kept:
    """Where a tensor between two segments lies: in which memory, "device", "host" or "video", and where there. "video"
    is host memory for the frames alone, which outlives the rest of it."""

    memory: str
    place: Place


@dataclass(frozen=True)
class Step:
    """A segment, the places of all that it makes and needs, and the bytes that are taken while it runs.

    trunk: the new trunk, None where the old one stays or is written over. branch: the new branch. layout begins `base`
    bytes into the device's piece. piece: bytes of that; device_bytes: all on the device, weights included.
    """

    segment: Segment
    layout: Layout | AttentionLayout
    base: int
    trunk: Kept | None
    branch: Kept | None
    piece: int
    device_bytes: int
    host_bytes: int


def walk(config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int) -> Iterator[Step]:
    """The segments of a route, in order, each with what is taken while it runs."""
    walker = _Walker(config, latent, policy, chunking, element)
    while walker.index < len(walker.stages):
        yield walker.advance()


def follow(
    config: VaeConfig, latent: Shape, policy: Policy, route: Sequence[Segment], element: int
) -> tuple[Step, ...]:
    """The steps of a given route, however much it takes."""
    walker = _Walker(config, latent, policy, DecodeChunking(), element)
    return tuple(walker.taken(segment) for segment in route)


class _Trial(NamedTuple):
    """Memory with what a segment keeps, its own chunks aside."""

    device: Ends
    host: Ends
    trunk: Kept | None
    branch: Kept | None


class _Walker:
    """What is kept before stage `index`."""

    def __init__(
        self, config: VaeConfig, latent: Shape, policy: Policy, chunking: DecodeChunking, element: int
    ) -> None:
        self.stages, self.index, self.shape = stages(config), 0, latent
        self._trunk: Kept | None = None  # at first the latent, in memory of its own
        self._branch: Kept | None = None
        self._device, self._host = Ends(), Ends()
        self._policy, self._chunking, self._element = policy, chunking, element
        self._fixed, self._video = fixed_bytes(config, latent, element), Place(0, 0)
        if policy.moments == "global":  # whatever is kept meanwhile, the frames must fit at the end
            video = latent
            for stage in self.stages:
                video = stage.shape(video)
            self._video = Place(0, aligned(video.positions * config.out_channels * element))

    def advance(self) -> Step:
        """The next segment: the first choice that fits without making much more work, or else that fits at all."""
        fitting: list[Segment] = []
        for segment in self._choices():
            found = self._fitted(segment, self._trial(segment))
            if found is None:
                continue
            if found[1] <= WORTH:
                return self.taken(found[0])
            fitting.append(found[0])
        if fitting:
            return self.taken(fitting[0])
        raise ResourceError(
            f"decoding {self.shape.frames} frames of {self.shape.width}x{self.shape.height} values at stage "
            f"{self.index} does not fit in {self._chunking.device_bytes / 2**30:.2f} GiB of video memory and "
            f"{self._chunking.host_bytes / 2**30:.2f} GiB of RAM",
            "Allow more memory, or decode a smaller or shorter video.",
        )

    def taken(self, segment: Segment) -> Step:
        """Takes the segment as it is."""
        trial = self._trial(segment)
        layout = self._layout(segment, trial)
        piece = trial.device.extent + layout.size
        step = Step(
            segment,
            layout,
            trial.device.low,
            trial.trunk,
            trial.branch,
            piece,
            self._fixed + piece,
            trial.host.extent + self._video.size,
        )
        self._device, self._host = trial.device, trial.host
        if trial.trunk is not None:
            self._give(self._trunk)
            self._trunk = trial.trunk
        self._give(self._branch)
        self._branch = trial.branch
        self.shape, self.index = self._after(segment), segment.last
        return step

    def _give(self, kept: Kept | None) -> None:
        if kept is not None:
            (self._device if kept.memory == "device" else self._host).give(kept.place)

    def _trial(self, segment: Segment) -> _Trial:
        """A new trunk lies at the other end than the old one, a new branch beside it or at the other end than a trunk
        that stays: then what is given back lies beside what is free."""
        part, after = self.stages[segment.first : segment.last], self._after(segment)
        memory = {"device": self._device.copy(), "host": self._host.copy()}
        size = after.positions * part[-1].outputs * self._element
        trunk: Kept | None = None
        branch: Kept | None = None
        other_end = self._trunk is not None and not self._trunk.place.high
        if segment.trunk == "host" and segment.last == len(self.stages):
            trunk = Kept("video", self._video)
        elif segment.trunk and part[0].kind != "attend":  # that one works in place
            spare = segment.spare * after.frames * after.width * part[-1].outputs * self._element
            trunk = Kept(segment.trunk, memory[segment.trunk].take(size + spare, other_end))
        if part[-1].kind == "first":
            branch = Kept(segment.branch, memory[segment.branch].take(size, other_end))
        return _Trial(memory["device"], memory["host"], trunk, branch)

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

    def _layout(self, segment: Segment, trial: _Trial) -> Layout | AttentionLayout:
        part = self.stages[segment.first : segment.last]
        from_host, to_host = self._on_host(segment, trial)
        if part[0].kind == "attend":
            return attention_layout(self.shape, part[0].inputs, self._element, from_host[0])
        return chunk_layout(part, self.shape, segment, from_host, to_host, self._element)

    def _on_host(self, segment: Segment, trial: _Trial) -> tuple[OnHost, OnHost]:
        """What is read from there, and what is written there."""

        def host(kept: Kept | None) -> bool:
            return kept is not None and kept.memory != "device"

        writes = trial.trunk is not None or trial.branch is None or segment.last - segment.first > 1
        trunk = trial.trunk or self._trunk
        return (host(self._trunk), host(self._branch)), (host(trunk) and writes, host(trial.branch))

    def _fitted(self, segment: Segment, trial: _Trial) -> tuple[Segment, float] | None:
        """The segment with the best chunks that fit beside what is kept meanwhile, and `_work` of it."""
        room = self._chunking.device_bytes - self._fixed - trial.device.extent
        if trial.host.extent + self._video.size > self._chunking.host_bytes:
            return None
        part = self.stages[segment.first : segment.last]
        if part[0].kind == "attend":
            return (segment, 1.0) if self._layout(segment, trial).size <= room else None
        if part[0].kind == "in":  # what is kept now is there when the attention comes
            attention = attention_layout(self.shape, part[0].outputs, self._element, segment.trunk == "host")
            if attention.size > room:
                return None

        def fits(chunked: Segment) -> bool:
            return self._layout(chunked, trial).size <= min(room, LARGEST * self._element)

        return _best_chunks(part, self.shape, segment, self._chunking.frames, fits)

    def _after(self, segment: Segment) -> Shape:
        shape = self.shape
        for stage in self.stages[segment.first : segment.last]:
            shape = stage.shape(shape)
        return shape


def _best_chunks(
    part: Sequence[Stage], before: Shape, segment: Segment, most: int, fits: Callable[[Segment], bool]
) -> tuple[Segment, float] | None:
    """The chunks that fit and make the least work, and how many times the least work it is."""
    height = before.height * prod(stage.space for stage in part)
    best: tuple[Segment, float] | None = None
    frames = most
    while frames // 2 >= before.frames:  # all the same chunk
        frames //= 2
    while frames:
        chunked = replace(segment, frames=min(frames, before.frames))
        count = _fewest_bands(chunked, height, fits)
        if count:
            chunked = _in_bands(chunked, height, count)
            work = _work(part, before, chunked)
            best = (chunked, work) if best is None or work < best[1] else best
        frames //= 2
    return best


def _fewest_bands(segment: Segment, height: int, fits: Callable[[Segment], bool]) -> int:
    """Into how many bands the rows are cut at least, 0 if bands of one row are still too much."""

    def fits_in(count: int) -> bool:
        return fits(_in_bands(segment, height, count))

    if fits_in(1):
        return 1
    return 1 + bisect_left(range(1, height + 1), True, key=fits_in) if fits_in(height) else 0


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
