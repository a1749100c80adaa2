"""What encoder and decoder are made of: causal convolution, group norm, resnet, frame-causal attention.

Invariants: tensors are [channels, frames, height, width], no batch axis. A convolution or an attention never
sees a later frame; group norm does (its moments run over the whole clip it is given), so decoding a prefix
gives slightly different frames. Group norm and SiLU are computed in float32, everything else in the dtype of
the weights. Attribute names are the tensor names of the released file.
Source: the released VAE code, `vae/unet_causal_3d_blocks`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.kernels.group_norm import wide

NORM_EPS = 1e-6


class CausalConv3d(nn.Module):
    """Convolution that repeats edge values: in time `kernel - 1` copies of the first frame in front and none
    behind, in space `kernel // 2` on each side."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[C, T, H, W] -> [D, ceil(T / stride), ceil(H / stride), ceil(W / stride)]"""
        x = x.to(self.conv.weight.dtype)
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        out: Tensor = self.conv(x)
        return out


class GroupNorm(nn.GroupNorm):
    """Group norm over all frames and positions, in float32; the result has the weights' dtype."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x).to(self.weight.dtype)

    def normalized(self, x: Tensor) -> Tensor:
        """[C, T, H, W] -> the same shape in float32, a tensor of its own."""
        weight, bias, x = (tensor.to(wide(tensor.dtype)) for tensor in (self.weight, self.bias, x))
        return F.group_norm(x[None], self.num_groups, weight, bias, self.eps)[0]


class GroupNormSilu(GroupNorm):
    """Group norm, then SiLU, both in float32; the result has the weights' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalized(x)
        return F.silu(x, inplace=not x.requires_grad).to(self.weight.dtype)


class Resnet(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (by a 1x1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSilu(groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = GroupNormSilu(groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = None if in_channels == out_channels else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[C, T, H, W] -> [D, T, H, W]"""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class FrameCausalAttention(nn.Module):
    """One-head attention over all positions: each sees its own frame and all earlier ones.

    No mask is built: the queries of frame t meet the keys of frames 0..t, one frame after another.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[C, T, H, W] -> [C, T, H, W], the input added."""
        channels, frames, height, width = x.shape
        tokens = self.group_norm(x).reshape(channels, -1).T
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        rows = height * width
        seen = [
            _attend(q[frame * rows : (frame + 1) * rows], k[: (frame + 1) * rows], v[: (frame + 1) * rows])
            for frame in range(frames)
        ]
        out: Tensor = self.to_out[0](torch.cat(seen))
        return x + out.T.reshape(x.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, C], [m, C], [m, C] -> [n, C]; torch's attention kernels want batch and head axes in front."""
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)])
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        out: Tensor = self.resnets[1](x)
        return out
