"""The decoder's stages on chunks: each fed some frames and rows of its input, carrying what it must remember.

Tensors are [frames, rows, columns, channels] (what cuDNN computes in; [C, T, H, W] would be transposed twice a
convolution). A convolution's input is written once, normalized and with its border, into a padded buffer. All buffers
are places in the segment's `Room`, known before (layout.py): nothing is allocated on the way. Weights are those of
`VaeDecoder`, laid out channels-last; only the upsamplers' are new (`phase_weight`).

Between `first` and `second` of a resnet two tensors travel: the trunk and the branch. The branch has not got its
convolution's bias: only the norm of `second` looks at it, and has the bias in its shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.kernels.group_norm import (
    Affine,
    Moments,
    Phases,
    add_and_measure,
    interleave,
    measure,
    normalize_into,
    wide,
)
from lowvram_i2v.vae.causal import CausalConv3d, FrameCausalAttention, GroupNorm, Resnet
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.layout import AttentionLayout, Buffers, Place
from lowvram_i2v.vae.route import OUT_CHANNELS, Rows, Stage, stages

Convolve = Callable[[Tensor, Tensor, Tensor], None]
"""[T, R, W, C], [D, C, t, r, w], into [T - t + 1, R - r + 1, W - w + 1, D]."""

Attend = Callable[[Tensor, Tensor, Tensor, "Room", AttentionLayout], Tensor]
"""Queries [M, C], keys and values [N, C], of one head -> [M, C]."""


class Room:
    """The memory of a segment's chunks, uint8, and what is at which place."""

    def __init__(self, memory: Tensor, dtype: torch.dtype) -> None:
        self._memory, self._dtype = memory, dtype

    def bytes_at(self, place: Place) -> Tensor:
        start = place.offset(self._memory.numel())
        return self._memory[start : start + place.size]

    def at(self, place: Place, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self._dtype
        start = place.offset(self._memory.numel())
        return self._memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Window(NamedTuple):
    """values [T, R, W, C]: some frames, and the rows from `top` on, of a picture of `height` rows."""

    values: Tensor
    top: int
    height: int

    @property
    def bottom(self) -> int:
        return self.top + self.values.shape[1]

    def part(self, rows: Rows) -> Tensor:
        """The rows `rows` of the picture, a view."""
        return self.values[:, rows[0] - self.top : rows[1] - self.top]


class State(NamedTuple):
    """What travels from stage to stage; a norm looks at the branch where there is one."""

    trunk: Window
    branch: Window | None = None

    @property
    def measured(self) -> Window:
        return self.trunk if self.branch is None else self.branch


class StreamedConv:
    """A causal convolution fed chunk by chunk: it keeps the last frames of its padded input."""

    def __init__(self, weight: Tensor, bias: Tensor, convolve: Convolve) -> None:
        self.weight, self.bias, self._convolve = weight, bias, convolve
        self._past = weight.shape[2] - 1
        self._carry: Tensor | None = None

    def restart(self) -> None:
        """The next chunk is a video's first, or one of another band."""
        self._carry = None

    @property
    def started(self) -> bool:
        return self._carry is not None

    def __call__(self, x: Window, affine: Affine | None, room: Room, at: Buffers) -> Tensor:
        """The convolution of silu(x * scale + shift), of x itself without an affine; the bias is not yet added."""
        frames, rows, width, channels = x.values.shape
        above, below, past = int(x.top == 0), int(x.bottom == x.height), self._past
        high = above + rows + below
        padded = room.at(at.padded, (past + frames, high, width + 2, channels))
        normalize_into(padded[past:], x.values, affine, above, below)
        if self._carry is None:
            padded[:past] = padded[past]
            self._carry = room.at(at.carry, (past, high, width + 2, channels))
        else:
            padded[:past] = self._carry
        self._carry.copy_(padded[-past:])
        outputs, _, _, *taps = self.weight.shape
        out = room.at(at.out, (frames, high - taps[0] + 1, width + 3 - taps[1], outputs))
        self._convolve(padded, self.weight, out)
        return out


@dataclass
class Norm:
    """A group norm's parameters."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    added: Tensor | None = None  # to what the norm looks at, and not there yet

    @classmethod
    def of(cls, norm: GroupNorm, added: Tensor | None = None) -> Norm:
        return cls(norm.weight, norm.bias, norm.num_groups, norm.eps, added)

    def moments(self) -> Moments:
        return Moments(self.groups, self.weight.device)

    def known(self, moments: Moments) -> Affine:
        scale, shift = moments.affine(self.weight, self.bias, self.eps)
        return scale, shift if self.added is None else shift + self.added * scale


class StreamedStage:
    """One stage with its weights. `norm` is the norm at its input, None for `in` and `up`, which have none."""

    def __init__(self, stage: Stage, conv: StreamedConv, norm: Norm | None, shortcut: nn.Conv3d | None = None) -> None:
        self.stage, self.norm = stage, norm
        self._conv, self._shortcut = conv, shortcut

    def restart(self) -> None:
        self._conv.restart()

    def __call__(
        self, state: State, affine: Affine | None, core: Rows, moments: Moments | None, room: Room, at: Buffers
    ) -> State:
        """One chunk; the moments of the rows `core` of what comes out join `moments`."""
        started = self._conv.started
        x = state.measured
        out = self._conv(x, affine, room, at)
        if self.stage.kind == "up":
            return self._upsampled(x, out, started, core, moments, room.at(at.values, self._upsampled_shape(x)))
        top, _ = self.stage.rows_made((x.top, x.bottom), x.height)
        window = Window(out, top, x.height)
        measured = slice(core[0] - top, core[1] - top)
        if self.stage.kind == "first":
            if moments is not None:
                measure(out, self._conv.bias, moments, measured)
            return State(self._trunk(state.trunk, room, at), window)
        residual = state.trunk.part((top, window.bottom)) if self.stage.kind == "second" else None
        add_and_measure(out, self._conv.bias, residual, moments, measured)
        return State(window)

    def _trunk(self, x: Window, room: Room, at: Buffers) -> Window:
        """A resnet's input, through the 1x1x1 convolution where the width changes."""
        if self._shortcut is None:
            return x
        weight, bias = self._shortcut.weight, self._shortcut.bias
        assert bias is not None
        out = room.at(at.narrow, (*x.values.shape[:3], len(weight)))
        for frame, into in zip(x.values, out, strict=True):  # a frame's rows are one piece
            torch.addmm(bias, frame.flatten(0, 1), weight.flatten(1).t(), out=into.flatten(0, 1))
        return x._replace(values=out)

    def _upsampled_shape(self, x: Window) -> tuple[int, int, int, int]:
        """Of all frames' copies, the first frame's too, which is not doubled and cut off."""
        top, bottom = self.stage.rows_made((x.top, x.bottom), x.height)
        frames, _, width, _ = x.values.shape
        return self.stage.time * frames, bottom - top, 2 * width, self.stage.outputs

    def _upsampled(
        self, x: Window, phases: Tensor, started: bool, core: Rows, moments: Moments | None, values: Tensor
    ) -> State:
        top, _ = self.stage.rows_made((x.top, x.bottom), x.height)
        dropped = 0 if started else self.stage.time - 1
        values = values[: len(values) - dropped]
        spread = Phases(self.stage.time, top, x.top - (x.top == 0), dropped)
        interleave(values, phases, spread, self._conv.bias, moments, slice(core[0] - top, core[1] - top))
        return State(Window(values, top, x.height * self.stage.space))


class StreamedAttention:
    """Frame-causal attention over a whole clip of normalized tokens: keys and values of all frames stay."""

    def __init__(self, stage: Stage, attention: FrameCausalAttention, attend: Attend) -> None:
        self.stage, self.norm, self._attend = stage, Norm.of(attention.group_norm), attend
        self._to_q, self._to_k, self._to_v = attention.to_q, attention.to_k, attention.to_v
        self._to_out: Any = attention.to_out[0]
        self._k = self._v = torch.empty(0)
        self._room: Room | None = None
        self._seen = 0

    def start(self, positions: int, room: Room, at: AttentionLayout) -> None:
        """Takes the places for the keys and values of `positions` tokens."""
        size = (positions, len(self.norm.weight))
        self._k, self._v = room.at(at.k, size), room.at(at.v, size)
        self._room, self._at, self._seen = room, at, 0

    def restart(self) -> None:
        """Lets go of the places."""
        self._k = self._v = torch.empty(0)
        self._room = None

    def __call__(self, x: Tensor, affine: Affine, moments: Moments) -> Tensor:
        """One frame [1, H, W, C], whole; the moments of the result join `moments`."""
        room, at, size = self._room, self._at, (x.shape[1] * x.shape[2], x.shape[3])
        assert room is not None
        normed, tokens = room.at(at.scores, size, affine[0].dtype), room.at(at.tokens, size)
        tokens.copy_(torch.addcmul(affine[1], x.reshape(size), affine[0], out=normed))
        seen, q = self._seen + len(tokens), room.at(at.q, size)
        for linear, out in ((self._to_q, q), (self._to_k, self._k), (self._to_v, self._v)):
            into = out if out is q else out[self._seen : seen]
            torch.addmm(linear.bias, tokens, linear.weight.t(), out=into)
        self._seen = seen
        y = self._attend(q, self._k[:seen], self._v[:seen], room, at)
        out = torch.mm(y, self._to_out.weight.t(), out=q).view(x.shape)
        add_and_measure(out, self._to_out.bias, x, moments)
        return out


Runnable = StreamedStage | StreamedAttention


def phase_weight(weight: Tensor, time: int) -> Tensor:
    """An upsampler's weight [D, C, 3, 3, 3] for its small input: all phases' filters, [time 4 D, C, 2 or 3, 2, 2].

    Nearest neighbour times two, then three taps: the taps fall on two values only, which two depends on whether the
    result is at an even or an odd place. Even: (w0, w1 + w2) on the one before and the one itself; odd: (w0 + w1, w2)
    on itself and the one after. In causal time the first copy of frame k sees (w0 + w1) of frame k - 1 and w2 of k, the
    second w0 and w1 + w2. So 8 filters of 2x2x2 taps replace 27 taps on 8 times as many values: 2.4 times less work,
    and the upsampled tensor is never made. Sums in float32.
    """
    taps = weight.to(wide(weight.dtype))

    def even(dim: int, w: Tensor) -> Tensor:
        a, b, c = w.unbind(dim)
        return torch.stack([a, b + c], dim)

    def odd(dim: int, w: Tensor) -> Tensor:
        a, b, c = w.unbind(dim)
        return torch.stack([a + b, c], dim)

    in_time = [odd(2, taps), even(2, taps)] if time > 1 else [taps]
    rows = [phase(3, w) for w in in_time for phase in (even, odd)]
    columns = [phase(4, w) for w in rows for phase in (even, odd)]
    return _channels_last(torch.cat(columns).to(weight.dtype))


def streamed_stages(decoder: VaeDecoder, convolve: Convolve, attend: Attend) -> list[Runnable]:
    """The decoder's stages in the order of `route.stages`."""
    inner: Any = decoder.decoder
    resnets = [*inner.mid_block.resnets]
    made: list[Runnable] = []
    descriptions = iter(stages(decoder.config))

    def add_resnet(resnet: Resnet) -> None:
        made.append(_convolution(next(descriptions), resnet.conv1, resnet.norm1, convolve, resnet.conv_shortcut))
        made.append(
            _convolution(next(descriptions), resnet.conv2, resnet.norm2, convolve, added=resnet.conv1.conv.bias)
        )

    made.append(_convolution(next(descriptions), inner.conv_in, None, convolve))
    add_resnet(resnets[0])
    attention = inner.mid_block.attentions[0]
    made.append(StreamedAttention(next(descriptions), attention, attend))
    add_resnet(resnets[1])
    for block in inner.up_blocks:
        for resnet in block.resnets:
            add_resnet(resnet)
        for upsampler in block.upsamplers:
            made.append(_convolution(next(descriptions), upsampler.conv, None, convolve))
    made.append(_convolution(next(descriptions), inner.conv_out, inner.conv_norm_out, convolve))
    return made


def _convolution(
    stage: Stage,
    conv: CausalConv3d,
    norm: GroupNorm | None,
    convolve: Convolve,
    shortcut: CausalConv3d | None = None,
    added: Tensor | None = None,
) -> StreamedStage:
    inner, narrow = conv.conv, None if shortcut is None else shortcut.conv
    assert inner.bias is not None
    weight, bias = inner.weight, inner.bias
    if stage.kind == "up":
        weight = phase_weight(weight, stage.time)
    elif stage.kind == "out":
        padding = OUT_CHANNELS - len(bias)
        weight, bias = _channels_last(F.pad(weight, (0, 0) * 4 + (0, padding))), F.pad(bias, (0, padding))
    else:
        inner.weight.data = _channels_last(weight)
        weight = inner.weight
    return StreamedStage(
        stage, StreamedConv(weight, bias, convolve), None if norm is None else Norm.of(norm, added), narrow
    )


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last_3d)
