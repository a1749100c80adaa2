"""The VAE's forward pass for a batch, with the modules of `lowvram_i2v.vae`: training only.

The runtime has no batch axis and one clip of the demo's size does not fill a GPU. The order of operations is that of
`vae/causal.py`, with a leading axis; a test compares the two. Weights stay float32 and are cast where they are used;
group norm has its moments in float32 whatever the dtype.

Narrow 3D convolutions are what GPU libraries do worst, and which way is fastest depends on the library. So a causal
convolution is computed in one of several `Way`s that differ in rounding only, and `fastest` tries them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.vae.causal import CausalConv3d, FrameCausalAttention, GroupNorm, GroupNormSilu, MidBlock, Resnet
from lowvram_i2v.vae.encoder import split_moments

TRIED, WARM = 3, 2  # steps timed and steps before them


@dataclass(frozen=True)
class Way:
    """How convolutions are computed. flat: as 2D convolutions over three frames side by side. channels_last: the
    memory layout that tensor cores read."""

    dtype: torch.dtype
    flat: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        kind, layout = "2D" if self.flat else "3D", "channels last" if self.channels_last else "channels first"
        return f"{kind} convolutions, {layout}, {str(self.dtype).removeprefix('torch.')}"


def plain_way(device: torch.device) -> Way:
    """bfloat16 on a GPU; on a CPU everything stays float32."""
    return Way(torch.bfloat16 if device.type == "cuda" else torch.float32)


def fastest(device: torch.device, step: Callable[[Way], None]) -> Way:
    """The way with which `step`, forward and backward, takes least time here. On a CPU the plain one, untried.

    The library's own search for algorithms is switched on if that helps: it costs a second or two with every new shape.
    """
    if device.type != "cuda":
        return plain_way(device)
    ways = [Way(torch.bfloat16, flat, last) for flat in (False, True) for last in (False, True)]
    seconds = {way: _timed(step, way) for way in ways}
    best = min(ways, key=seconds.__getitem__)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark = _timed(step, best) < 0.95 * seconds[best]
    print(f"vae: {best}, search for algorithms {torch.backends.cudnn.benchmark}", flush=True)
    return best


def _timed(step: Callable[[Way], None], way: Way) -> float:
    """Seconds; infinite where the library has no algorithm or no memory."""
    try:
        for _ in range(WARM):
            step(way)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(TRIED):
            step(way)
        launched = (time.perf_counter() - begin) / TRIED
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"vae: {way} fails: {str(error)[:200]}", flush=True)
        return float("inf")
    taken = (time.perf_counter() - begin) / TRIED
    print(f"vae: {1e3 * taken:7.1f} ms a step, {1e3 * launched:.1f} until all is queued, with {way}", flush=True)
    return taken


def encode(model: Any, videos: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """videos [n, 3, F, H, W] in -1..1 -> mean, log variance: each [n, 16, T, h, w] float32."""
    encoder = model.encoder
    x = _conv(encoder.conv_in, videos.to(way.dtype), way)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, way)
        for downsampler in block.downsamplers:
            x = _conv(downsampler.conv, x, way)
    x = _mid(encoder.mid_block, x, way)
    x = _conv(encoder.conv_out, _norm(encoder.conv_norm_out, x), way)
    moments = _pointwise(model.quant_conv, x).float()
    mean, logvar = split_moments(moments.transpose(0, 1))
    return mean.transpose(0, 1), logvar.transpose(0, 1)


def decode(model: Any, latents: Tensor, way: Way) -> Tensor:
    """latents [n, 16, T, h, w], unscaled -> [n, 3, 4 (T - 1) + 1, 8 h, 8 w] float32."""
    decoder = model.decoder
    x = _conv(decoder.conv_in, _pointwise(model.post_quant_conv, latents.to(way.dtype)), way)
    x = _mid(decoder.mid_block, x, way)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, way)
        for upsampler in block.upsamplers:
            x = _conv(upsampler.conv, _upsampled(x, upsampler.factors), way)
    return _conv(decoder.conv_out, _norm(decoder.conv_norm_out, x), way).float()


def picture_latents(model: Any, videos: Tensor, way: Way) -> Tensor:
    """As inference has them: the means, and in front that of the first frame alone. [n, 16, T, h, w], unscaled."""
    first = encode(model, videos[:, :, :1], way)[0]
    return torch.cat([first, encode(model, videos, way)[0][:, :, 1:]], dim=2)


def _resnet(block: Resnet, x: Tensor, way: Way) -> Tensor:
    h = _conv(block.conv1, _norm(block.norm1, x), way)
    h = _conv(block.conv2, _norm(block.norm2, h), way)
    return h + (x if block.conv_shortcut is None else _pointwise(block.conv_shortcut.conv, x))


def _mid(block: MidBlock, x: Tensor, way: Way) -> Tensor:
    first, second = block.resnets
    x = _resnet(first, x, way)  # type: ignore[arg-type]
    x = _attention(block.attentions[0], x)  # type: ignore[arg-type]
    return _resnet(second, x, way)  # type: ignore[arg-type]


def _attention(block: FrameCausalAttention, x: Tensor) -> Tensor:
    frames, rows = x.shape[2], x.shape[3] * x.shape[4]
    tokens = _norm(block.group_norm, x).flatten(2).transpose(1, 2)
    q, k, v = (_linear(layer, tokens)[:, None] for layer in (block.to_q, block.to_k, block.to_v))
    seen = [
        F.scaled_dot_product_attention(
            q[:, :, frame * rows : (frame + 1) * rows], k[:, :, : (frame + 1) * rows], v[:, :, : (frame + 1) * rows]
        )
        for frame in range(frames)
    ]
    out = _linear(block.to_out[0], torch.cat(seen, dim=2)[:, 0])  # type: ignore[arg-type]
    return x + out.transpose(1, 2).reshape(x.shape)


def _upsampled(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Nearest neighbour; the first frame is not repeated in time."""
    time_factor, rows, columns = factors
    if time_factor > 1:
        x = x.repeat_interleave(time_factor, dim=2)[:, :, time_factor - 1 :]
    n, channels, frames = x.shape[:3]
    larger = F.interpolate(x.reshape(n, channels * frames, *x.shape[3:]), scale_factor=(rows, columns), mode="nearest")
    return larger.reshape(n, channels, frames, *larger.shape[2:])


def _norm(norm: GroupNorm, x: Tensor) -> Tensor:
    """With its SiLU, if it has one."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    normed = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return F.silu(normed) if isinstance(norm, GroupNormSilu) else normed


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _pointwise(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1x1 convolution, as a 2D one."""
    flat = F.conv2d(x.flatten(2, 3), layer.weight[:, :, 0].to(x.dtype), _bias(layer, x))
    return flat.reshape(len(x), -1, *x.shape[2:])


def _conv(layer: CausalConv3d, x: Tensor, way: Way) -> Tensor:
    """[n, C, T, H, W] -> [n, D, ...]; of kernel 3, with edges repeated as `CausalConv3d` repeats them."""
    weight, bias, stride = layer.conv.weight.to(x.dtype), _bias(layer.conv, x), layer.conv.stride
    if not way.flat:
        layout = torch.channels_last_3d if way.channels_last else torch.contiguous_format
        return F.conv3d(_padded(x, layout), weight.contiguous(memory_format=layout), bias, stride)
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    frames: Tensor = _SideBySide.apply(x, stride[0], layout)  # type: ignore[no-untyped-call]
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=layout)
    made = F.conv2d(frames, flat, bias, (stride[1], stride[2]))
    return made.reshape(len(x), -1, *made.shape[1:]).transpose(1, 2)


def _padded(x: Tensor, layout: torch.memory_format) -> Tensor:
    return _Padded.apply(x, layout)  # type: ignore[no-any-return, no-untyped-call]


def _bias(layer: nn.Conv3d, x: Tensor) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(x.dtype)


class _Padded(torch.autograd.Function):
    """Edge values repeated: two frames in front, one row and column on each side. torch's own gradient of it adds up
    with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        return _pad(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _unpad(grad.clone() if grad._is_view() else grad), None


class _SideBySide(torch.autograd.Function):
    """[n, C, T, H, W], padded -> [n * T / stride, 3 C, H + 2, W + 2]: each frame behind the two before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, layout: torch.memory_format) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        padded = _pad(x, torch.contiguous_format).transpose(1, 2)
        n, channels, frames, height, width = x.shape
        made = -(-frames // stride)
        out = x.new_empty(n * made, 3 * channels, height + 2, width + 2).contiguous(memory_format=layout)
        whole = out.view(n, made, *out.shape[1:])
        for place in range(3):
            seen = padded[:, place : place + stride * (made - 1) + 1 : stride]
            whole[:, :, place * channels : (place + 1) * channels].copy_(seen)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        n, channels, frames, height, width = ctx.shape
        whole = grad.reshape(n, -1, *grad.shape[1:])
        made = whole.shape[1]
        padded = grad.new_zeros(n, channels, frames + 2, height + 2, width + 2)
        for place in range(3):
            seen = padded[:, :, place : place + ctx.stride * (made - 1) + 1 : ctx.stride]
            seen += whole[:, :, place * channels : (place + 1) * channels].transpose(1, 2)
        return _unpad(padded), None, None


def _pad(x: Tensor, layout: torch.memory_format) -> Tensor:
    n, channels, frames, height, width = x.shape
    out = torch.empty(
        (n, channels, frames + 2, height + 2, width + 2), dtype=x.dtype, device=x.device, memory_format=layout
    )
    out[:, :, 2:, 1:-1, 1:-1].copy_(x)
    out[..., 1:-1, 0].copy_(out[..., 1:-1, 1])
    out[..., 1:-1, -1].copy_(out[..., 1:-1, -2])
    out[..., 0, :].copy_(out[..., 1, :])
    out[..., -1, :].copy_(out[..., -2, :])
    out[:, :, :2].copy_(out[:, :, 2:3].expand_as(out[:, :, :2]))
    return out


def _unpad(grad: Tensor) -> Tensor:
    """The gradient of `_pad`; works in place."""
    grad[:, :, 2] += grad[:, :, 0] + grad[:, :, 1]
    grad[..., 1, :] += grad[..., 0, :]
    grad[..., -2, :] += grad[..., -1, :]
    grad[..., 1] += grad[..., 0]
    grad[..., -2] += grad[..., -1]
    return grad[:, :, 2:, 1:-1, 1:-1]
