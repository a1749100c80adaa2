"""The encoder: a video (or one image as a video of one frame) to the mean and log variance of its latents.

Invariant: tensor names are the released file's (`encoder.*`, `quant_conv.*`). Left out: sampling (image to
video takes the mean, scaled by the caller) and tiles (`tiles.encode_tiled`).
"""

from __future__ import annotations

from torch import Tensor, nn

from lowvram_i2v.vae.causal import CausalConv3d, GroupNormSilu, MidBlock, Resnet
from lowvram_i2v.vae.config import BLOCK_STRIDES, BLOCKS, VaeConfig

LOGVAR_RANGE = (-30.0, 20.0)


class VaeEncoder(nn.Module):
    """Works in the dtype of its weights, returns float32."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.encoder = _Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video [3, 4 (T - 1) + 1, 8 h, 8 w] in -1..1 -> mean, log variance: each [16, T, h, w] float32."""
        return split_moments(self.moments(video))

    def moments(self, video: Tensor) -> Tensor:
        """video [3, F, H, W] -> [32, T, h, w] float32: mean, then log variance not yet clamped."""
        out: Tensor = self.quant_conv(self.encoder(video))
        return out.float()


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[32, T, h, w] -> mean and clamped log variance, each [16, T, h, w]."""
    mean, logvar = moments.chunk(2)
    return mean, logvar.clamp(*LOGVAR_RANGE)


class _Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList(_DownBlock(config, index) for index in range(BLOCKS))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNormSilu(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


class _DownBlock(nn.Module):
    def __init__(self, config: VaeConfig, index: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        inputs = [widths[max(index - 1, 0)], *[widths[index]] * (layers - 1)]
        self.resnets = nn.ModuleList(Resnet(width, widths[index], config.norm_num_groups) for width in inputs)
        self.downsamplers = nn.ModuleList(_Downsample(widths[index], s) for s in BLOCK_STRIDES[index : index + 1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class _Downsample(nn.Module):
    """A strided causal convolution."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out
