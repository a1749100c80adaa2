"""Latents to frames, streamed: the decoder's arithmetic in chunks, with the whole clip's moments and attention.

    latent -> [in, resnet, attention, ...] segment after segment -> frames

Each segment reads what the one before kept, chunk by chunk, and writes what it makes (`route` says where). The head's
norms are exact: the tensor before each is measured as it is written. The tail's tensors are too large to keep, so it
runs as one segment, twice: to measure its norms, and to emit frames. Every convolution gets the rows and frames that it
needs, so nothing is blended and no border is visible in the result.

The `reference` policy sends each of the reference's tiles through the same segments and blends as `tiles` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.device import release
from lowvram_i2v.kernels.group_norm import Affine, Moments
from lowvram_i2v.vae.attention import trusted_attention
from lowvram_i2v.vae.convolution import trusted_convolution
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.frames import Frames, Memory
from lowvram_i2v.vae.landing import Landing
from lowvram_i2v.vae.layout import AttentionLayout, Layout
from lowvram_i2v.vae.planning import Step, plan_route, tile_chunking, video_bytes
from lowvram_i2v.vae.policy import DecodeChunking, Policy
from lowvram_i2v.vae.route import Rows, Shape, Stage, bands, rows_through, spans
from lowvram_i2v.vae.streamed import Room, Runnable, State, StreamedAttention, StreamedStage, streamed_stages
from lowvram_i2v.vae.tiles import Tiling, blend_segments

EMITTED = 16  # frames of a yielded piece
SAMPLED = 2  # chunks of each band that give the tail's norms their first moments

SO_FAR: Affine = (torch.empty(0), torch.empty(0))
"""In place of a scale and shift: those of the moments that this very pass has measured so far."""

Watch = Callable[[Step | None], None]
"""Called before each segment, and after the last with None, for who measures."""


def decode_frames(
    decoder: VaeDecoder,
    latent: Tensor,
    policy: Policy,
    chunking: DecodeChunking | None = None,
    watch: Watch | None = None,
) -> Iterator[Tensor]:
    """latent [16, T, h, w], divided by the scaling factor -> finished frames [3, f, 8 h, 8 w] float32, in order, on
    the CPU; together what `VaeDecoder.decode` (global moments) or `decode_tiled` (tile moments) return.

    With tile moments, frames come as soon as the tiles of a time are blended. With global ones no frame is there before
    the last band of rows: the tail runs band after band, because it carries past frames along, and those of all bands
    take more memory than there is. After running out of device memory the tile or clip is decoded again in smaller
    chunks. Raises ResourceError where no chunk is small enough, torch.OutOfMemoryError where tiles cannot be mixed.
    """
    chunking = chunking or DecodeChunking()
    engine = Engine(decoder, watch)
    try:
        if policy.moments == "tile":
            config = decoder.config
            tiles = engine.tiles(Shape(*latent.shape[1:]), policy, chunking)
            yield from blend_segments(tiles, latent, Tiling.from_config(config), Landing)
            return
        frames = engine.decode(latent, policy, chunking)
        engine.only_video()
        for first in range(0, frames.shape[1], EMITTED):
            yield frames[:, first : first + EMITTED].float()
    finally:
        engine.close()


class Engine:
    """A decoder made ready for streaming: weights laid out channels-last, upsamplers turned into phases, and the memory
    that it works in. To be closed."""

    def __init__(self, decoder: VaeDecoder, watch: Watch | None = None) -> None:
        self._decoder, self._watch = decoder, watch
        weight = decoder.post_quant_conv.weight
        self._device, self._dtype = weight.device, weight.dtype
        convolve = trusted_convolution(self._device, self._dtype)
        self._stages = streamed_stages(decoder, convolve, trusted_attention(self._device, self._dtype))
        release(self._device)  # what the weights were made in
        self._memory = Memory(self._device, self._dtype)

    def only_video(self) -> None:
        """Begins to give back all memory but that of the frames which `decode` returned."""
        self._memory.only_video()

    def close(self) -> None:
        self._memory.close()

    def tiles(self, whole: Shape, policy: Policy, chunking: DecodeChunking) -> Callable[[Tensor], Tensor]:
        """Decodes tiles of a latent of this shape. Each is float32 [3, F, H, W], valid until the next one."""
        allowed = tile_chunking(self._decoder.config, whole, policy, chunking, self._dtype.itemsize)
        routes: dict[Shape, tuple[Step, ...]] = {}

        def decode(part: Tensor) -> Tensor:
            nonlocal allowed
            shape = Shape(*part.shape[1:])
            if shape not in routes:
                routes[shape] = plan_route(self._decoder.config, shape, policy, allowed, self._dtype.itemsize)
            try:
                return self._memory.beside(self.run(part, routes[shape]))
            except torch.OutOfMemoryError:
                allowed = allowed.smaller()
                routes.clear()
            self._drop()
            return decode(part)

        return decode

    def decode(self, latent: Tensor, policy: Policy, chunking: DecodeChunking) -> Tensor:
        """[16, T, h, w] -> [3, F, H, W] in the weights' dtype, valid until the engine is used again or closed."""
        shape = Shape(*latent.shape[1:])
        while True:
            route = plan_route(self._decoder.config, shape, policy, chunking, self._dtype.itemsize)
            try:
                return self.run(latent, route).settled().permute(3, 0, 1, 2)
            except torch.OutOfMemoryError:
                chunking = chunking.smaller()
            self._drop()  # after the error and the tensors in its trace are gone

    def _drop(self) -> None:
        """The device's piece, and all views of it: a new one will be asked for."""
        for stage in self._stages:
            stage.restart()
        self._memory.drop()

    def run(self, latent: Tensor, route: Sequence[Step]) -> Frames:
        """One clip, with its own moments, along `route`: frames of pictures, which the engine's memory holds."""
        video = video_bytes(route)
        self._memory.fit(max(step.piece for step in route), max(step.host_bytes for step in route) - video, video)
        with torch.inference_mode():
            return _Run(self._stages, self._memory, route, self._watch).decode(self._after_quantization(latent))

    def _after_quantization(self, latent: Tensor) -> Tensor:
        """The 1x1x1 convolution before the decoder: [16, T, h, w] -> [T, h, w, 16]."""
        conv = self._decoder.post_quant_conv
        assert conv.bias is not None
        tokens = latent.to(self._device, self._dtype).permute(1, 2, 3, 0)
        return F.linear(tokens, conv.weight.flatten(1), conv.bias)


@dataclass
class _Kept:
    """The tensors that a segment kept, and the scale and shift of the norm that comes next."""

    trunk: Frames
    branch: Frames | None = None
    affine: Affine | None = None


class _Run:
    """One clip on its way: `decode` is the loop over segments, `_stream` the one over chunks."""

    def __init__(self, stages: list[Runnable], memory: Memory, route: Sequence[Step], watch: Watch | None) -> None:
        self._stages, self._memory, self._route, self._watch = stages, memory, route, watch

    def decode(self, latent: Tensor) -> Frames:
        """[T, h, w, 16] -> frames of pictures."""
        frames, height, width, _ = latent.shape
        kept = _Kept(Frames(latent, Shape(frames, height, width), 0))
        for stage in self._stages:
            stage.restart()  # a run before may have ended anywhere
        for step in self._route:
            if self._watch is not None:
                self._watch(step)
            segment = step.segment
            stages = self._stages[segment.first : segment.last]
            if isinstance(stages[0], StreamedAttention):
                self._attend(stages[0], step, kept)
            else:
                self._advance(step, [stage for stage in stages if isinstance(stage, StreamedStage)], kept)
        if self._watch is not None:
            self._watch(None)
        return kept.trunk

    def _attend(self, attention: StreamedAttention, step: Step, kept: _Kept) -> None:
        """Frame after frame, in place."""
        shape, moments, layout = kept.trunk.shape, attention.norm.moments(), step.layout
        assert kept.affine is not None
        assert isinstance(layout, AttentionLayout)
        room = self._memory.room(step.base, layout.size)
        kept.trunk.lend(room, layout.read[0], layout.sent[0])
        self._memory.begin()
        attention.start(shape.positions, room, layout)
        everything = [((frame, frame + 1), (0, shape.height)) for frame in range(shape.frames)]
        for frame, window in enumerate(kept.trunk.windows(everything)):
            kept.trunk.write(frame, 0, attention(window.values, kept.affine, moments))
        attention.restart()
        self._memory.end()
        self._measured(attention, kept, moments)

    def _advance(self, step: Step, stages: list[StreamedStage], kept: _Kept) -> None:
        """Measures what is not known, then runs the whole segment and keeps what it makes."""
        assert isinstance(step.layout, Layout)
        work = _Work(step, step.layout, self._memory.room(step.base, step.layout.size))
        kept.trunk.lend(work.room, work.layout.read[0], ())
        if kept.branch is not None:
            kept.branch.lend(work.room, work.layout.read[1], ())
        affines = [kept.affine, *self._affines_within(work, stages, kept)]
        moments = [*[None] * (len(stages) - 1), self._moments_after(stages[-1])]
        trunk, branch = self._rooms(work, [stage.stage for stage in stages], kept)

        def keep(state: State, frame: int, core: Rows) -> None:
            if trunk is not kept.trunk:
                trunk.write(frame, core[0], state.trunk.part(core)[..., : trunk.memory.shape[3]])
            if branch is not None and state.branch is not None:
                branch.write(frame, core[0], state.branch.part(core))

        self._stream(work, stages, kept, affines, moments, keep)
        kept.trunk, kept.branch = trunk, branch
        self._measured(stages[-1], kept, moments[-1])

    def _affines_within(self, work: _Work, stages: list[StreamedStage], kept: _Kept) -> list[Affine | None]:
        """The scales and shifts of the norms of the segment's second and further stages."""
        measures = work.step.segment.measures
        if measures is None:
            return self._measured_one_by_one(work, stages, kept)
        return self._measured_together(work, stages, kept, measures)

    def _measured_one_by_one(self, work: _Work, stages: list[StreamedStage], kept: _Kept) -> list[Affine | None]:
        """Exact: a pass for each stage but the last, with the norms before it known."""
        affines = [kept.affine]
        for count, stage in enumerate(stages[:-1], 1):
            moments = self._moments_after(stage)
            self._stream(work, stages[:count], kept, affines, [*[None] * (count - 1), moments])
            affines += self._known(stages[count:], [moments])
        return affines[1:]

    def _measured_together(
        self, work: _Work, stages: list[StreamedStage], kept: _Kept, measures: int
    ) -> list[Affine | None]:
        """As good as `measures` passes make them: first moments from a sample, where each norm takes what the very pass
        has measured so far, then moments of all with the scales and shifts of the pass before."""
        inner = [self._moments_after(stage) for stage in stages[:-1]]
        self._stream(work, stages[:-1], kept, [kept.affine, *[SO_FAR] * (len(stages) - 2)], inner, sample=True)
        for _ in range(measures):
            affines = [kept.affine, *self._known(stages[1:], inner)]
            inner = [self._moments_after(stage) for stage in stages[:-1]]
            self._stream(work, stages[:-1], kept, affines[:-1], inner)
        return self._known(stages[1:], inner)

    def _stream(
        self,
        work: _Work,
        stages: Sequence[StreamedStage],
        kept: _Kept,
        affines: Sequence[Affine | None],
        moments: Sequence[Moments | None],
        keep: Callable[[State, int, Rows], None] | None = None,
        sample: bool = False,
    ) -> None:
        """Runs `stages` over all bands and chunks of what was kept, or of a sample, with the given scales and shifts
        (None before a stage without a norm); what each stage makes joins its `moments`."""
        part, time = [stage.stage for stage in stages], prod(stage.stage.time for stage in stages)
        chunks, inputs = work.inputs(part, kept.trunk.shape, sample)
        self._memory.begin()
        for (chunk, core, _), state in zip(inputs, _read(kept, part[0], inputs), strict=True):
            if chunk == chunks[0]:
                for stage in stages:
                    stage.restart()
            for index, (stage, at) in enumerate(zip(stages, work.layout.stages, strict=False)):
                affine = affines[index]
                if affine is SO_FAR:
                    (affine,) = self._known([stage], [moments[index - 1]])
                rows = _rows_before(core, part[index + 1 :])
                state = stage(state, affine, rows, moments[index] if rows[0] < rows[1] else None, work.room, at)
            if keep is not None:
                keep(state, max(0, (chunk[0] - 1) * time + 1), core)
        for stage in stages:
            stage.restart()
        self._memory.end()

    def _rooms(self, work: _Work, part: Sequence[Stage], kept: _Kept) -> tuple[Frames, Frames | None]:
        """Where the segment writes: at new places, or over the trunk, moved up by what is read above."""
        step, shape, outputs = work.step, kept.trunk.shape, part[-1].outputs
        for stage in part:
            shape = stage.shape(shape)
        branch = None if step.branch is None else self._memory.frames(step.branch, shape, outputs, 0)
        if branch is not None:
            branch.lend(work.room, (), work.layout.sent[1])
        if step.trunk is None and branch is not None and len(part) == 1:
            return kept.trunk, branch
        if step.trunk is not None:
            trunk = self._memory.frames(step.trunk, shape, outputs, step.segment.spare)
        else:
            trunk = kept.trunk.over(len(part) - (part[0].kind == "second"))
        trunk.lend(work.room, (), work.layout.sent[0])
        return trunk, branch

    def _moments_after(self, stage: Runnable) -> Moments | None:
        """For the norm after this stage, if one comes."""
        following = self._stages[self._stages.index(stage) + 1 :]
        return following[0].norm.moments() if following and following[0].norm else None

    def _measured(self, stage: Runnable, kept: _Kept, moments: Moments | None) -> None:
        following = self._stages[self._stages.index(stage) + 1 :]
        (kept.affine,) = self._known(following[:1], [moments]) if following else [None]

    @staticmethod
    def _known(stages: Sequence[Runnable], moments: Sequence[Moments | None]) -> list[Affine | None]:
        """The scales and shifts of the norms of `stages`, with the moments measured before each."""
        return [
            None if stage.norm is None or before is None else stage.norm.known(before)
            for stage, before in zip(stages, moments, strict=False)
        ]


@dataclass(frozen=True)
class _Work:
    """A step's chunks, and the memory that they are computed in."""

    step: Step
    layout: Layout
    room: Room

    def inputs(self, part: Sequence[Stage], before: Shape, sample: bool) -> tuple[list[Rows], list[_Chunk]]:
        """The chunks of frames of each band, all or some in the middle; and for each band and chunk its frames, the
        rows that it makes, and the rows at the input of each stage."""
        segment, height = self.step.segment, before.height * prod(stage.space for stage in part)
        chunks = spans(before.frames, segment.frames)
        if sample:
            chunks = chunks[len(chunks) // 2 :][:SAMPLED]
        cores = [(core, rows_through(part, core, before)) for core in bands(height, segment.rows)]
        return chunks, [(chunk, core, needed) for core, needed in cores for chunk in chunks]


_Chunk = tuple[Rows, Rows, list[Rows]]


def _rows_before(core: Rows, later: Sequence[Stage]) -> Rows:
    """Rows that the stages `later` make `core` of: those of all bands together are each row once. May be none."""
    space = prod(stage.space for stage in later)
    return -(-core[0] // space), -(-core[1] // space)


def _read(kept: _Kept, first: Stage, work: Sequence[_Chunk]) -> Iterator[State]:
    """The input of each chunk. A trunk beside a branch is only added: it is read where the branch's result lies."""
    inputs = [(chunk, needed[0]) for chunk, _, needed in work]
    if kept.branch is None:
        yield from (State(window) for window in kept.trunk.windows(inputs))
        return
    height = kept.trunk.shape.height
    beside = [(chunk, first.rows_made(rows, height)) for chunk, rows in inputs]
    yield from map(State, kept.trunk.windows(beside), kept.branch.windows(inputs))
