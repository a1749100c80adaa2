"""A 3-D convolution of [frames, rows, columns, channels], and whether this machine's one can be trusted.

Some pairs of torch and cuDNN compute 16-bit 3-D convolutions wrongly (cuDNN 9.8 to 9.14) or very slowly (torch 2.9.0,
which switches cuDNN off for them). One small convolution is compared with the same as a sum of 2-D convolutions; where
they differ, the sum is used from then on. It works everywhere and is slower: it rounds between the sums.

All write into memory that is there already. torch offers that for cuDNN's convolution by its name only, which also goes
around torch's own switches; what else there is makes a tensor and copies it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.vae.streamed import Convolve

TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # float32 convolutions may use TF32
SLOW_TORCH = "2.9.0"


def cudnn_conv3d(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x [T, R, W, C], weight [D, C, t, r, w], into [T - t + 1, R - r + 1, W - w + 1, D], without padding."""
    cudnn = torch.backends.cudnn
    torch.ops.aten.cudnn_convolution.out(
        _channels_first(x),
        weight,
        [0, 0, 0],
        [1, 1, 1],
        [1, 1, 1],
        1,
        False,
        cudnn.deterministic,
        x.dtype == torch.float32 and cudnn.allow_tf32,
        out=_channels_first(out),
    )


def conv3d(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same, as torch chooses."""
    out.copy_(F.conv3d(_channels_first(x), weight)[0].permute(1, 2, 3, 0))


def conv2d_sum(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same as one 2-D convolution a tap of time, frames as the batch."""
    frames, taps = x.permute(0, 3, 1, 2), weight.shape[2]
    made = len(x) - taps + 1
    total = F.conv2d(frames[:made], weight[:, :, 0])
    for tap in range(1, taps):
        total += F.conv2d(frames[tap : tap + made], weight[:, :, tap])
    out.copy_(total.permute(0, 2, 3, 1))


def _channels_first(x: Tensor) -> Tensor:
    """A view [1, C, T, R, W]; the batch axis' stride tells torch that channels come last."""
    return x[None].permute(0, 4, 1, 2, 3)


def trusted_convolution(device: torch.device, dtype: torch.dtype) -> Convolve:
    """The first of these that is right on the device and not known to be slow."""
    if device.type != "cuda":
        return conv3d
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(6, 34, 66, 128, generator=generator, device=device).to(dtype)
    weight = torch.randn(128, 128, 3, 3, 3, generator=generator, device=device).to(dtype) / 58
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    sum_of_2d = convolved(conv2d_sum, x, weight)
    cudnn = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    candidates: list[Convolve] = [cudnn_conv3d] if cudnn else []
    candidates += [] if torch.__version__.startswith(SLOW_TORCH) else [conv3d]
    return next((convolve for convolve in candidates if _right(convolve, x, weight, sum_of_2d)), conv2d_sum)


def _right(convolve: Convolve, x: Tensor, weight: Tensor, expected: Tensor) -> bool:
    """Whether it works here and gives that. Raises torch.OutOfMemoryError."""
    try:
        return agree(convolved(convolve, x, weight), expected)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # cuDNN has no engine for it on this card
        return False


def convolved(convolve: Convolve, x: Tensor, weight: Tensor) -> Tensor:
    """What the convolution makes, in new memory."""
    frames, rows, columns = (x.shape[axis] - weight.shape[axis + 2] + 1 for axis in range(3))
    out = x.new_zeros(frames, rows, columns, len(weight))
    convolve(x, weight, out)
    return out


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same convolution differ by no more than rounding. Waits for the device."""
    distance = (a.float() - b.float()).norm() / b.float().norm()
    return bool(distance < TOLERANCE[a.dtype])
