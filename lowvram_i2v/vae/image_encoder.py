"""The encoder for one picture, as 2-D convolutions.

A video of one frame is that frame repeated to every causal convolution: all its taps of time see the same values, so
their weights can be summed, once, and a third of the work remains. Equal to `VaeEncoder.encode` up to rounding; sums
are made in float32.

Memory: a resnet holds its input, one padded tensor, and one result; norm and SiLU are written into the padded one some
groups at a time. `encode_bytes` says how much that is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.kernels.group_norm import wide
from lowvram_i2v.vae.causal import CausalConv3d, GroupNorm, Resnet
from lowvram_i2v.vae.encoder import VaeEncoder, split_moments
from lowvram_i2v.vae.planning import NORMED_AT_ONCE


class ImageEncoder:
    """Encodes pictures with the weights of `encoder`, whose 3-D weights it replaces by their sums over time."""

    def __init__(self, encoder: VaeEncoder) -> None:
        self._encoder = encoder
        for module in encoder.modules():
            if isinstance(module, nn.Conv3d) and module.weight.shape[2] > 1:
                weight = module.weight
                module.weight = nn.Parameter(
                    weight.to(wide(weight.dtype)).sum(2, keepdim=True).to(weight.dtype), requires_grad=False
                )

    @torch.inference_mode()
    def encode(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """picture [3, 1, H, W] in -1..1 -> mean, log variance: each [16, 1, H / 8, W / 8] float32."""
        inner: Any = self._encoder.encoder
        x = _convolved(picture[:, 0].to(inner.conv_in.conv.weight.dtype), inner.conv_in)
        for block in inner.down_blocks:
            for resnet in block.resnets:
                x = _resnet(x, resnet)
            for downsampler in block.downsamplers:
                x = _convolved(x, downsampler.conv)
        x = _resnet(x, inner.mid_block.resnets[0])
        x = inner.mid_block.attentions[0](x[:, None])[:, 0]
        x = _resnet(x, inner.mid_block.resnets[1])
        x = _convolved(x, inner.conv_out, inner.conv_norm_out)
        conv = self._encoder.quant_conv
        out: Tensor = F.conv2d(x[None], conv.weight[:, :, 0], conv.bias)[0]
        return split_moments(out.float()[:, None])


def _resnet(x: Tensor, resnet: Resnet) -> Tensor:
    h = _convolved(x, resnet.conv1, resnet.norm1)
    padded = _padded(h, resnet.norm2)
    del h  # not held beside the result
    h = _convolved_padded(padded, resnet.conv2)
    h += x if resnet.conv_shortcut is None else _convolved(x, resnet.conv_shortcut)
    return h


def _convolved(x: Tensor, causal: CausalConv3d, norm: GroupNorm | None = None) -> Tensor:
    """[C, H, W], through norm and SiLU if there is a norm -> [D, ceil(H / stride), ceil(W / stride)]."""
    return _convolved_padded(x if causal.conv.kernel_size[1] == 1 else _padded(x, norm), causal)


def _convolved_padded(padded: Tensor, causal: CausalConv3d) -> Tensor:
    conv = causal.conv
    return F.conv2d(padded[None], conv.weight[:, :, 0], conv.bias, stride=conv.stride[1:])[0]


def _padded(x: Tensor, norm: GroupNorm | None) -> Tensor:
    """[C, H, W] -> [C, H + 2, W + 2], edges repeated."""
    channels, height, width = x.shape
    out = x.new_empty(channels, height + 2, width + 2)
    if norm is None:
        out[:, 1:-1, 1:-1] = x
    else:
        dtype, size = wide(x.dtype), channels // norm.num_groups
        step = max(1, norm.num_groups // NORMED_AT_ONCE) * size
        for first in range(0, channels, step):
            part = slice(first, first + step)
            weight, bias = norm.weight[part].to(dtype), norm.bias[part].to(dtype)
            groups = len(weight) // size
            normed = F.group_norm(x[None, part].to(dtype), groups, weight, bias, norm.eps)[0]
            out[part, 1:-1, 1:-1] = F.silu(normed, inplace=True)
    out[:, 0], out[:, -1] = out[:, 1], out[:, -2]
    out[:, :, 0], out[:, :, -1] = out[:, :, 1], out[:, :, -2]
    return out
