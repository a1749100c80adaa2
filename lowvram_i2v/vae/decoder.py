"""The decoder: latents to frames, all at once.

Invariants: tensor names are the released file's (`decoder.*`, `post_quant_conv.*`); T latent frames give
4 (T - 1) + 1 frames. Left out: tiles (`tiles.decode_tiled`), without which only small videos fit in memory,
and the scaling factor and the clamp to the picture range, which are the caller's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.vae.causal import CausalConv3d, GroupNormSilu, MidBlock, Resnet
from lowvram_i2v.vae.config import BLOCK_STRIDES, BLOCKS, VaeConfig


class VaeDecoder(nn.Module):
    """Works in the dtype of its weights, returns float32."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = _Decoder(config)

    def decode(self, latent: Tensor) -> Tensor:
        """latent [16, T, h, w], divided by the scaling factor -> [3, 4 (T - 1) + 1, 8 h, 8 w] float32."""
        x = self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype))
        out: Tensor = self.decoder(x)
        return out.float()


class _Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[-1], 3)
        self.mid_block = MidBlock(widths[-1], groups)
        self.up_blocks = nn.ModuleList(_UpBlock(config, index) for index in range(BLOCKS))
        self.conv_norm_out = GroupNormSilu(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


class _UpBlock(nn.Module):
    """One resnet more than the encoder's block of the same width."""

    def __init__(self, config: VaeConfig, index: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels[::-1], config.layers_per_block + 1
        inputs = [widths[max(index - 1, 0)], *[widths[index]] * (layers - 1)]
        self.resnets = nn.ModuleList(Resnet(width, widths[index], config.norm_num_groups) for width in inputs)
        self.upsamplers = nn.ModuleList(_Upsample(widths[index], s) for s in BLOCK_STRIDES[index : index + 1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class _Upsample(nn.Module):
    """Nearest neighbour, then a convolution. The first frame is never repeated in time."""

    def __init__(self, channels: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[C, T, H, W] -> [C, t (T - 1) + 1, 2 H, 2 W] with t the factor of time"""
        time, rows, columns = self.factors
        if time > 1:
            x = x.repeat_interleave(time, dim=1)[:, time - 1 :]
        x = F.interpolate(x, scale_factor=(rows, columns), mode="nearest")
        out: Tensor = self.conv(x)
        return out
