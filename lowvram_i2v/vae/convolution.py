"""A 3-D convolution of [frames, rows, columns, channels], and whether this machine's one can be trusted.

Some pairs of torch and cuDNN compute 16-bit 3-D convolutions wrongly (cuDNN 9.8 to 9.14) or very slowly (torch 2.9.0,
which switches cuDNN off for them). One small convolution is compared with the same as a sum of 2-D convolutions; where
they differ, the sum is used from then on. It works everywhere and is slower: it rounds between the sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.vae.streamed import Convolve

TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # float32 convolutions may use TF32
SLOW_TORCH = "2.9.0"


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, R, W, C], weight [D, C, t, r, w] -> [T - t + 1, R - r + 1, W - w + 1, D], without padding."""
    # batch axis first: its stride tells torch that channels come last
    return F.conv3d(x[None].permute(0, 4, 1, 2, 3), weight)[0].permute(1, 2, 3, 0).contiguous()


def conv2d_sum(x: Tensor, weight: Tensor) -> Tensor:
    """The same as one 2-D convolution a tap of time, frames as the batch."""
    frames, taps = x.permute(0, 3, 1, 2), weight.shape[2]
    made = len(x) - taps + 1
    total = F.conv2d(frames[:made], weight[:, :, 0])
    for tap in range(1, taps):
        total += F.conv2d(frames[tap : tap + made], weight[:, :, tap])
    return total.permute(0, 2, 3, 1).contiguous()


def trusted_convolution(device: torch.device, dtype: torch.dtype) -> Convolve:
    """`conv3d`, or `conv2d_sum` where the device's 3-D convolution is wrong or known to be slow."""
    if device.type != "cuda":
        return conv3d
    if torch.__version__.startswith(SLOW_TORCH):
        return conv2d_sum
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(6, 34, 66, 128, generator=generator, device=device).to(dtype)
    weight = torch.randn(128, 128, 3, 3, 3, generator=generator, device=device).to(dtype) / 58
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return conv3d if agree(conv3d(x, weight), conv2d_sum(x, weight)) else conv2d_sum


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same convolution differ by no more than rounding. Waits for the device."""
    distance = (a.float() - b.float()).norm() / b.float().norm()
    return bool(distance < TOLERANCE[a.dtype])
