"""The decoder's stages on chunks: each fed some frames and rows of its input, carrying what it must remember.

Tensors are [frames, rows, columns, channels] (what cuDNN computes in; [C, T, H, W] would be transposed twice a
convolution). A convolution's input is written once, normalized and with its border, into a padded buffer. Weights are
those of `VaeDecoder`, laid out channels-last; only the upsamplers' are new (`phase_weight`).

Between `first` and `second` of a resnet two tensors travel: the trunk and the branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.kernels.group_norm import Affine, Moments, add_and_measure, normalize_into, wide
from lowvram_i2v.vae.causal import CausalConv3d, FrameCausalAttention, GroupNorm, Resnet
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.route import OUT_CHANNELS, Rows, Stage, stages

Convolve = Callable[[Tensor, Tensor], Tensor]
"""[T, R, W, C], [D, C, t, r, w] -> [T - t + 1, R - r + 1, W - w + 1, D]."""


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

    def __call__(self, x: Window, affine: Affine | None) -> Tensor:
        """The convolution of silu(x * scale + shift), of x itself without an affine; the bias is not yet added."""
        frames, rows, width, channels = x.values.shape
        above, below, past = int(x.top == 0), int(x.bottom == x.height), self._past
        padded = self.weight.new_empty(past + frames, above + rows + below, width + 2, channels)
        normalize_into(padded[past:], x.values, affine, above, below)
        if self._carry is None:
            padded[:past] = padded[past]
            self._carry = padded[-past:].clone()
        else:
            padded[:past] = self._carry
            self._carry.copy_(padded[-past:])
        return self._convolve(padded, self.weight)


@dataclass
class Norm:
    """A group norm's parameters, and the scale and shift that its moments made of them."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    affine: Affine | None = None

    @classmethod
    def of(cls, norm: GroupNorm) -> Norm:
        return cls(norm.weight, norm.bias, norm.num_groups, norm.eps)

    def moments(self) -> Moments:
        return Moments(self.groups, self.weight.device)

    def known(self, moments: Moments) -> Affine:
        return moments.affine(self.weight, self.bias, self.eps)


class StreamedStage:
    """One stage with its weights. `norm` is the norm at its input, None for `in` and `up`, which have none."""

    def __init__(self, stage: Stage, conv: StreamedConv, norm: Norm | None, shortcut: nn.Conv3d | None = None) -> None:
        self.stage, self.norm = stage, norm
        self._conv, self._shortcut = conv, shortcut

    def restart(self) -> None:
        self._conv.restart()

    def __call__(self, state: State, affine: Affine | None, core: Rows, moments: Moments | None) -> State:
        """One chunk; the moments of the rows `core` of what comes out join `moments`."""
        started = self._conv.started
        x = state.measured
        out = self._conv(x, affine)
        if self.stage.kind == "up":
            return self._upsampled(x, out, started, core, moments)
        top, _ = self.stage.rows_made((x.top, x.bottom), x.height)
        window = Window(out, top, x.height)
        residual = state.trunk.part((top, window.bottom)) if self.stage.kind == "second" else None
        add_and_measure(out, self._conv.bias, residual, moments, slice(core[0] - top, core[1] - top))
        if self.stage.kind != "first":
            return State(window)
        return State(self._trunk(state.trunk), window)

    def _trunk(self, x: Window) -> Window:
        """A resnet's input, through the 1x1x1 convolution where the width changes."""
        if self._shortcut is None:
            return x
        weight, bias = self._shortcut.weight, self._shortcut.bias
        return x._replace(values=F.linear(x.values, weight.flatten(1), bias))

    def _upsampled(self, x: Window, phases: Tensor, started: bool, core: Rows, moments: Moments | None) -> State:
        top, bottom = self.stage.rows_made((x.top, x.bottom), x.height)
        values = interleave(phases, self.stage, x.top - (x.top == 0), (top, bottom))
        values = values[self.stage.time - 1 :] if not started else values  # the first frame is not doubled
        add_and_measure(values, self._conv.bias, None, moments, slice(core[0] - top, core[1] - top))
        return State(Window(values, top, x.height * self.stage.space))


class StreamedAttention:
    """Frame-causal attention over a whole clip of normalized tokens: keys and values of all frames stay."""

    def __init__(self, stage: Stage, attention: FrameCausalAttention) -> None:
        self.stage, self.norm = stage, Norm.of(attention.group_norm)
        self._to_q, self._to_k, self._to_v = attention.to_q, attention.to_k, attention.to_v
        self._to_out: Any = attention.to_out[0]
        self._k = self._v = torch.empty(0)
        self._seen = 0

    def start(self, positions: int) -> None:
        """Makes room for the keys and values of `positions` tokens."""
        weight = self.norm.weight
        self._k, self._v = (weight.new_empty(positions, len(weight)) for _ in range(2))
        self._seen = 0

    def finish(self) -> None:
        self._k = self._v = torch.empty(0)

    def __call__(self, x: Tensor, affine: Affine, moments: Moments) -> Tensor:
        """One frame [1, H, W, C], whole; the moments of the result join `moments`."""
        tokens = torch.addcmul(affine[1], x.flatten(0, 2).to(affine[0].dtype), affine[0]).to(x.dtype)
        seen = self._seen + len(tokens)
        self._k[self._seen : seen] = self._to_k(tokens)
        self._v[self._seen : seen] = self._to_v(tokens)
        self._seen = seen
        q, k, v = self._to_q(tokens), self._k[:seen], self._v[:seen]
        out = F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]
        y = F.linear(out, self._to_out.weight).view(x.shape)
        add_and_measure(y, self._to_out.bias, x, moments)
        return y


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


def interleave(phases: Tensor, stage: Stage, top: int, rows: Rows) -> Tensor:
    """Phases [T, I, W + 1, time 4 D] to the rows `rows` of the upsampled picture [time T, R, 2 W, D].

    Row i of the phases is made of the input's rows top + i and top + i + 1, column j of columns j - 1 and j.
    """
    frames, _, width, _ = phases.shape
    width -= 1
    phases = phases.view(*phases.shape[:3], stage.time, 2, 2, stage.outputs)
    out = phases.new_empty(frames, stage.time, rows[1] - rows[0], 2 * width, stage.outputs)
    for odd_row in range(2):
        start = rows[0] + (rows[0] + odd_row) % 2  # the first row of this phase
        count = len(range(start, rows[1], 2))
        pair = (start - 1) // 2 - top
        for odd_column in range(2):
            part = phases[:, pair : pair + count, odd_column : odd_column + width, :, odd_row, odd_column]
            out[:, :, start - rows[0] :: 2, odd_column::2] = part.movedim(3, 1)
    return out.flatten(0, 1)


def streamed_stages(decoder: VaeDecoder, convolve: Convolve) -> list[Runnable]:
    """The decoder's stages in the order of `route.stages`."""
    inner: Any = decoder.decoder
    resnets = [*inner.mid_block.resnets]
    made: list[Runnable] = []
    descriptions = iter(stages(decoder.config))

    def add_resnet(resnet: Resnet) -> None:
        made.append(_convolution(next(descriptions), resnet.conv1, resnet.norm1, convolve, resnet.conv_shortcut))
        made.append(_convolution(next(descriptions), resnet.conv2, resnet.norm2, convolve))

    made.append(_convolution(next(descriptions), inner.conv_in, None, convolve))
    add_resnet(resnets[0])
    attention = inner.mid_block.attentions[0]
    made.append(StreamedAttention(next(descriptions), attention))
    add_resnet(resnets[1])
    for block in inner.up_blocks:
        for resnet in block.resnets:
            add_resnet(resnet)
        for upsampler in block.upsamplers:
            made.append(_convolution(next(descriptions), upsampler.conv, None, convolve))
    made.append(_convolution(next(descriptions), inner.conv_out, inner.conv_norm_out, convolve))
    return made


def _convolution(
    stage: Stage, conv: CausalConv3d, norm: GroupNorm | None, convolve: Convolve, shortcut: CausalConv3d | None = None
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
    return StreamedStage(stage, StreamedConv(weight, bias, convolve), None if norm is None else Norm.of(norm), narrow)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last_3d)
