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
from lowvram_i2v.vae.convolution import trusted_convolution
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.frames import Frames, Shelf
from lowvram_i2v.vae.planning import plan_route
from lowvram_i2v.vae.policy import DecodeChunking, Policy
from lowvram_i2v.vae.route import Rows, Segment, Shape, Stage, bands, rows_through, spans
from lowvram_i2v.vae.streamed import Runnable, State, StreamedAttention, StreamedStage, streamed_stages
from lowvram_i2v.vae.tiles import Tiling, blend_segments, join_tiles

EMITTED = 16  # frames of a yielded piece
SAMPLED = 2  # chunks of each band that give the tail's norms their first moments


def decode_frames(
    decoder: VaeDecoder, latent: Tensor, policy: Policy, chunking: DecodeChunking | None = None
) -> Iterator[Tensor]:
    """latent [16, T, h, w], divided by the scaling factor -> finished frames [3, f, 8 h, 8 w] float32, in order, on
    the CPU; together what `VaeDecoder.decode` (global moments) or `decode_tiled` (tile moments) return.

    After running out of device memory the tile or clip is decoded again in smaller chunks.
    Raises ResourceError where no chunk is small enough.
    """
    chunking = chunking or DecodeChunking()
    engine = Engine(decoder)
    if policy.moments == "tile":
        yield from blend_segments(
            lambda part: engine.decode(part, policy, chunking).float(),
            latent,
            Tiling.from_config(decoder.config),
            _land,
            _join,
        )
        return
    frames = engine.decode(latent, policy, chunking)
    for first in range(0, frames.shape[1], EMITTED):
        yield frames[:, first : first + EMITTED].float()


def _land(part: Tensor) -> Tensor:
    """A finished part on its way to the CPU; it is there after the device was waited for."""
    if not part.is_cuda:
        return part.clone()
    landed = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return landed.copy_(part.contiguous(), non_blocking=True)


def _join(rows: list[list[Tensor]]) -> Tensor:
    if rows[0][0].is_pinned():
        torch.cuda.synchronize()
    return join_tiles(rows)


class Engine:
    """A decoder made ready for streaming: weights laid out channels-last, upsamplers turned into phases."""

    def __init__(self, decoder: VaeDecoder) -> None:
        self._decoder = decoder
        weight = decoder.post_quant_conv.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._stages = streamed_stages(decoder, trusted_convolution(self._device, self._dtype))

    def decode(self, latent: Tensor, policy: Policy, chunking: DecodeChunking) -> Tensor:
        """[16, T, h, w] -> [3, F, H, W] in the weights' dtype, on the CPU (global moments) or the device."""
        shape = Shape(*latent.shape[1:])
        while True:
            route = plan_route(self._decoder.config, shape, policy, chunking, self._dtype.itemsize)
            try:
                return self.run(latent, route)
            except torch.OutOfMemoryError:
                chunking = chunking.smaller()
            release(self._device)  # after the error and the tensors in its trace are gone

    @torch.inference_mode()
    def run(self, latent: Tensor, route: Sequence[Segment]) -> Tensor:
        """One clip, with its own moments, along `route`."""
        with Shelf(self._device, self._dtype) as shelf:
            frames = _Run(self._stages, shelf, route).decode(self._after_quantization(latent))
            return frames.settled().permute(3, 0, 1, 2).clone()

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
    spent: Frames | None = None  # the last branch, whose memory the next may take


class _Run:
    """One clip on its way: `decode` is the loop over segments, `_stream` the one over chunks."""

    def __init__(self, stages: list[Runnable], shelf: Shelf, route: Sequence[Segment]) -> None:
        self._stages, self._shelf, self._route = stages, shelf, route

    def decode(self, latent: Tensor) -> Frames:
        """[T, h, w, 16] -> frames of pictures."""
        frames, height, width, _ = latent.shape
        kept = _Kept(Frames(latent, Shape(frames, height, width), 0))
        for segment in self._route:
            stages = self._stages[segment.first : segment.last]
            if isinstance(stages[0], StreamedAttention):
                self._attend(stages[0], kept)
            else:
                self._advance(segment, [stage for stage in stages if isinstance(stage, StreamedStage)], kept)
        return kept.trunk

    def _attend(self, attention: StreamedAttention, kept: _Kept) -> None:
        """Frame after frame, in place."""
        shape, moments = kept.trunk.shape, attention.norm.moments()
        assert kept.affine is not None
        attention.start(shape.positions)
        everything = [((frame, frame + 1), (0, shape.height)) for frame in range(shape.frames)]
        for frame, window in enumerate(kept.trunk.windows(everything)):
            kept.trunk.write(frame, 0, attention(window.values, kept.affine, moments))
        attention.finish()
        self._measured(attention, kept, moments)

    def _advance(self, segment: Segment, stages: list[StreamedStage], kept: _Kept) -> None:
        """Measures what is not known, then runs the whole segment and keeps what it makes."""
        affines = [kept.affine, *self._affines_within(segment, stages, kept)]
        moments = [*[None] * (len(stages) - 1), self._moments_after(stages[-1])]
        trunk, branch = self._rooms(segment, [stage.stage for stage in stages], kept)

        def keep(state: State, frame: int, core: Rows) -> None:
            if trunk is not kept.trunk:
                trunk.write(frame, core[0], state.trunk.part(core)[..., : trunk.memory.shape[3]])
            if branch is not None and state.branch is not None:
                branch.write(frame, core[0], state.branch.part(core))

        self._stream(segment, stages, kept, affines, moments, keep)
        if trunk.memory is not kept.trunk.memory:
            self._shelf.clear(kept.trunk)
        kept.trunk, kept.branch, kept.spent = trunk, branch, kept.branch or kept.spent
        self._measured(stages[-1], kept, moments[-1])

    def _affines_within(self, segment: Segment, stages: list[StreamedStage], kept: _Kept) -> list[Affine | None]:
        """Of the segment's second and further stages: exact ones by a pass each, or by passes for all at once."""
        affines: list[Affine | None] = [kept.affine]
        inner = [self._moments_after(stage) for stage in stages[:-1]]
        if segment.measures is None:
            for count, moments in enumerate(inner, 1):
                self._stream(segment, stages[:count], kept, affines, [*[None] * (count - 1), moments])
                affines += self._known(stages[count:], [moments])
            return affines[1:]
        guess = [*affines, *[None] * (len(stages) - 2)]  # None: what this very pass has measured so far
        self._stream(segment, stages[:-1], kept, guess, inner, sample=True)
        for _ in range(segment.measures):
            affines = [kept.affine, *self._known(stages[1:], inner)]
            inner = [self._moments_after(stage) for stage in stages[:-1]]
            self._stream(segment, stages[:-1], kept, affines[:-1], inner)
        return self._known(stages[1:], inner)

    def _stream(
        self,
        segment: Segment,
        stages: Sequence[StreamedStage],
        kept: _Kept,
        affines: Sequence[Affine | None],
        moments: Sequence[Moments | None],
        keep: Callable[[State, int, Rows], None] | None = None,
        sample: bool = False,
    ) -> None:
        """Runs `stages` over all bands and chunks of what was kept, or of a sample, with the given scales and shifts;
        what each stage makes joins its `moments`."""
        part, before = [stage.stage for stage in stages], kept.trunk.shape
        height, time = before.height * prod(stage.space for stage in part), prod(stage.time for stage in part)
        chunks = spans(before.frames, segment.frames)
        if sample:
            chunks = chunks[len(chunks) // 2 :][:SAMPLED]
        cores = [(core, rows_through(part, core, before)) for core in bands(height, segment.rows)]
        work = [(chunk, core, needed) for core, needed in cores for chunk in chunks]
        for (chunk, core, _), state in zip(work, _read(kept, part[0], work), strict=True):
            if chunk == chunks[0]:
                for stage in stages:
                    stage.restart()
            for index, stage in enumerate(stages):
                affine = affines[index]
                if affine is None and stage.norm is not None:
                    (affine,) = self._known([stage], [moments[index - 1]])
                state = stage(state, affine, core, moments[index])
            if keep is not None:
                keep(state, max(0, (chunk[0] - 1) * time + 1), core)
        for stage in stages:
            stage.restart()

    def _rooms(self, segment: Segment, part: Sequence[Stage], kept: _Kept) -> tuple[Frames, Frames | None]:
        """Where the segment writes: new memory, the trunk's own (moved up by what is read above), a spent branch's."""
        shape, last = kept.trunk.shape, part[-1]
        for stage in part:
            shape = stage.shape(shape)
        branch = None
        if last.kind == "first":
            branch = kept.spent if kept.spent is not None and kept.spent.fits(shape, last.outputs) else None
            if branch is None:
                self._forget(kept)
                branch = self._shelf.room(shape, last.outputs, segment.branch)
            kept.spent = None
        elif kept.branch is None:
            self._forget(kept)
        if segment.trunk:
            return self._shelf.room(shape, last.outputs, segment.trunk, segment.spare), branch
        if branch is not None and len(part) == 1:
            return kept.trunk, branch
        return kept.trunk.over(len(part) - (part[0].kind == "second")), branch

    def _forget(self, kept: _Kept) -> None:
        if kept.spent is not None:
            self._shelf.clear(kept.spent)
        kept.spent = None

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


def _read(kept: _Kept, first: Stage, work: Sequence[tuple[Rows, Rows, list[Rows]]]) -> Iterator[State]:
    """The input of each chunk. A trunk beside a branch is only added: it is read where the branch's result lies."""
    inputs = [(chunk, needed[0]) for chunk, _, needed in work]
    if kept.branch is None:
        yield from (State(window) for window in kept.trunk.windows(inputs))
        return
    height = kept.trunk.shape.height
    beside = [(chunk, first.rows_made(rows, height)) for chunk, rows in inputs]
    yield from map(State, kept.trunk.windows(beside), kept.branch.windows(inputs))
