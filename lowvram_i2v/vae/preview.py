"""Small decoders for a look at a video in the making: a matrix of 16 x 3, and TAEHV.

    latents [16, T, h, w], as the sampler has them (times the scaling factor)  ->  pictures [3, H, W] in 0..1

`linear_rgb` needs no weights: one pixel a latent. The numbers are a least-squares fit that ComfyUI and others ship for
this VAE. `TinyDecoder` is TAEHV (github.com/madebyollin/taehv), 9.8 million parameters, full size. It knows a frame
only through the frame before it, so frames are decoded one at a time and memory does not grow with the video.

Invariants: tensor names are the file's (`decoder.*`); nothing here is exact, and no result is ever fed back. Left out:
the encoder of TAEHV, and reading files, which is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_TO_RGB = (  # one row a latent channel; the result is in -1..1
    (-0.0395, -0.0331, 0.0445),
    (0.0696, 0.0795, 0.0518),
    (0.0135, -0.0945, -0.0282),
    (0.0108, -0.0250, -0.0765),
    (-0.0209, 0.0032, 0.0224),
    (-0.0804, -0.0254, -0.0639),
    (-0.0991, 0.0271, -0.0669),
    (-0.0646, -0.0422, -0.0400),
    (-0.0696, -0.0595, -0.0894),
    (-0.0799, -0.0208, -0.0375),
    (0.1166, 0.1627, 0.0962),
    (0.1165, 0.0432, 0.0407),
    (-0.2315, -0.1920, -0.1355),
    (-0.0270, 0.0401, -0.0821),
    (-0.0616, -0.0997, -0.0727),
    (0.0249, -0.0469, -0.1703),
)
RGB_BIAS = (0.0259, -0.0192, -0.0761)

LATENT_CHANNELS = 16
WIDTHS = (256, 128, 64)  # channels of the stages in the released file
SPLITS = (1, 2, 2)  # into how many frames each stage's end makes one
BLOCKS = 3  # of a stage
LEADING_FRAMES = 3  # the first latent stands for one frame, but gives four: three have no past and are dropped


def linear_rgb(latents: Tensor) -> Tensor:
    """latents [16, T, h, w] -> [T, 3, h, w] in 0..1, float32, on the same device: a picture for each latent frame."""
    matrix = latents.new_tensor(LATENT_TO_RGB, dtype=torch.float32)
    bias = latents.new_tensor(RGB_BIAS, dtype=torch.float32)[:, None, None]
    rgb = torch.einsum("cthw,cr->trhw", latents.float(), matrix) + bias
    return (rgb / 2 + 0.5).clamp_(0, 1)


Past = dict[str, Tensor]  # block -> what came into it a frame earlier


class TinyDecoder(nn.Module):
    """TAEHV's decoder: 2-D convolutions with zero padding, no norm; a block sees its own input of the frame before.

    Works in the dtype of its weights, returns float32.
    """

    def __init__(self, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {"1": _conv(LATENT_CHANNELS, widths[0])}
        for stage, (width, frames) in enumerate(zip(widths, SPLITS, strict=True)):
            *blocks, grow, conv = _names(stage)
            layers |= {name: _Block(width) for name in blocks}
            layers[grow] = _Grow(width, frames)
            layers[conv] = _conv(width, (*widths, widths[-1])[stage + 1], bias=False)
        layers["22"] = _conv(widths[-1], 3)
        self.decoder = nn.ModuleDict(layers)

    def decode(self, latents: Tensor, every_frame: bool = True) -> Iterator[Tensor]:
        """latents [16, T, h, w] -> 4 (T - 1) + 1 frames [3, 8 h, 8 w] in 0..1, float32, as they are ready.

        Without `every_frame` T frames, each latent's last, at a quarter of the work; the blocks' past is then a latent
        ago, not a frame, which is close enough for a look.
        """
        past: Past = {}
        skipped = LEADING_FRAMES if every_frame else 0
        dtype = next(self.parameters()).dtype
        for latent in latents.to(dtype).unbind(1):
            x = torch.tanh(latent[None] / 3) * 3
            x = self.decoder["1"](x).relu_()
            for frame in self._stages(x, 0, past, every_frame):
                if skipped:
                    skipped -= 1
                else:
                    yield frame[0].float().clamp_(0, 1)

    def _stages(self, x: Tensor, stage: int, past: Past, every_frame: bool) -> Iterator[Tensor]:
        """One picture [1, C, h, w] through this stage and all that follow, depth first: every frame it splits into
        runs to its end before the next, so that the pasts are in order."""
        if stage == len(SPLITS):
            yield self.decoder["22"](x.relu_())
            return
        *blocks, grow, conv = _names(stage)
        for name in blocks:
            out = self.decoder[name](x, past.get(name))
            past[name], x = x, out
        for frame in self.decoder[grow](x, every_frame):
            larger = self.decoder[conv](F.interpolate(frame, scale_factor=2, mode="nearest"))
            yield from self._stages(larger, stage + 1, past, every_frame)


def _names(stage: int) -> list[str]:
    """The file's numbers of a stage's blocks, its split in time and its last convolution. The one between blocks and
    split, left out, is the upsampling."""
    first = 3 + (BLOCKS + 3) * stage
    return [str(first + offset) for offset in (*range(BLOCKS), BLOCKS + 1, BLOCKS + 2)]


class _Block(nn.Module):
    """Three convolutions over [x, past], and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        steps = [_conv(2 * width, width), nn.ReLU(inplace=True), _conv(width, width), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*steps, _conv(width, width))

    def forward(self, x: Tensor, past: Tensor | None) -> Tensor:
        """x, past [1, C, h, w]; no past is zeros -> [1, C, h, w]"""
        out: Tensor = self.conv(torch.cat([x, torch.zeros_like(x) if past is None else past], dim=1))
        return out.add_(x).relu_()


class _Grow(nn.Module):
    """One picture becomes one or two. The file's order is upsample, then this; a 1x1 convolution does not mind."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor, every_frame: bool) -> tuple[Tensor, ...]:
        """x [1, C, h, w] -> that many times [1, C, h, w]; the last alone without `every_frame`"""
        if every_frame:
            return self.conv(x).chunk(self.frames, dim=1)  # type: ignore[no-any-return]
        return (F.conv2d(x, self.conv.weight[-x.shape[1] :]),)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def tiny_decoder_bytes(height: int, width: int, element: int) -> int:
    """Peak bytes that `TinyDecoder.decode(every_frame=False)` allocates for latents of height x width, beside the
    weights, the latents and what the convolutions take as workspace.

    At the worst moment there are the pasts of all blocks, each stage's picture before and after its split, and the last
    stage's upsampled picture with its convolution.
    """
    pixels = height * width
    sizes = [(channels * pixels << 2 * stage) * element for stage, channels in enumerate(WIDTHS)]
    return (BLOCKS + 2) * sum(sizes) + 2 * 4 * sizes[-1]
