"""Do tiles show? Both decode policies on the same latents, random weights: `python tests/bench/seams.py`.

On a GPU at 1280x720x129 with full width and the released tiles (256 pixels, 64 frames); on a CPU at 448x320x57 with an
eighth of the width and half such tiles. Latents: a smooth gradient; the sample photo through the encoder, standing
still; the same, moving a latent to the left with every latent frame. A Markdown row for each axis and measure
(`lowvram_i2v.seams` says what they are): the level inside tiles, and that of borders in units of it. Below each latent
what `compare` says of the two policies' videos.

Random weights make patterns of any range: pictures are scaled to mean 128 and deviation 40 by the seamless video's
moments, both policies by the same. With --model the VAE of a model folder is used, and its range.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from lowvram_i2v.checkpoint import open_model  # noqa: E402
from lowvram_i2v.compare import Comparison, compare_frames  # noqa: E402
from lowvram_i2v.device import compute_dtype, describe, pick_device  # noqa: E402
from lowvram_i2v.image import pixels  # noqa: E402
from lowvram_i2v.sample_photo import draw_sample_photo  # noqa: E402
from lowvram_i2v.seams import Seam, Tiles  # noqa: E402
from lowvram_i2v.vae.config import VaeConfig  # noqa: E402
from lowvram_i2v.vae.decoder import VaeDecoder  # noqa: E402
from lowvram_i2v.vae.encoder import VaeEncoder  # noqa: E402
from lowvram_i2v.vae.engine import decode_frames  # noqa: E402
from lowvram_i2v.vae.image_encoder import ImageEncoder  # noqa: E402
from lowvram_i2v.vae.policy import POLICIES  # noqa: E402
from lowvram_i2v.video import to_uint8  # noqa: E402

NARROW = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 4}  # as many channels a group as released
LATENTS = ("gradient", "still", "moving")


class Vae:
    """Encoder and decoder, with random weights or a model folder's."""

    def __init__(self, model: Path | None, config: VaeConfig, device: torch.device) -> None:
        self.device, self.trained = device, model is not None
        dtype = compute_dtype(device, torch.float16)
        if model is None:
            torch.manual_seed(0)
            self.config = config
            self.encoder, self.decoder = (
                randomized(kind(self.config)).to(device, dtype).eval() for kind in (VaeEncoder, VaeDecoder)
            )
            return
        folder = open_model(model)
        self.config = folder.header.vae
        loaded = ExitStack()
        self.encoder, self.decoder = (
            loaded.enter_context(folder.load("vae", partial(kind, self.config), device=device, dtype=dtype))
            for kind in (VaeEncoder, VaeDecoder)
        )
        self._loaded = loaded  # its end would unload them

    def latents(self, name: str, frames: int, height: int, width: int) -> Tensor:
        """[16, frames, height, width], as the decoder takes them."""
        if name == "gradient":
            axes = (torch.linspace(-1, 1, extent) for extent in (frames, height, width))
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
            slopes = torch.randn(self.config.latent_channels, 3, generator=torch.Generator().manual_seed(1))
            return torch.einsum("cx,xthw->cthw", slopes, places).to(self.device)
        step = name == "moving"
        whole = self.photo(height, width + step * (frames - 1))
        return torch.cat([whole[..., step * frame : step * frame + width] for frame in range(frames)], 1)

    def photo(self, height: int, width: int) -> Tensor:
        """The photo's latent [16, 1, height, width]; a random encoder's gets mean 0 and deviation 1 in each channel."""
        picture = draw_sample_photo(8 * width, 8 * height)
        mean, _ = ImageEncoder(self.encoder).encode(torch.from_numpy(pixels(picture))[:, None].to(self.device))
        if self.trained:
            return mean
        centred = mean - mean.mean((1, 2, 3), keepdim=True)
        return centred / centred.std((1, 2, 3), keepdim=True)


def randomized(module: nn.Module) -> nn.Module:
    """Weights that keep values near one, and norms that differ from channel to channel."""
    for name, parameter in module.requires_grad_(False).named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.2 * noise + float("norm" in name and name.endswith("weight")))
    return module


def measured(vae: Vae, latent: Tensor) -> Comparison:
    """a: the seamless policy's video, b: the reference's."""
    videos = {}
    for name in ("seamless", "reference"):
        start = time.perf_counter()
        videos[name] = torch.cat([piece.half() for piece in decode_frames(vae.decoder, latent, POLICIES[name])], 1)
        print(f"{name} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    mean, deviation = 0.0, 1.0
    if not vae.trained:
        sample = videos["seamless"][:, ::4].float()
        mean, deviation = float(sample.mean()), float(sample.std()) * 128 / 40
    tiles = Tiles(vae.config.sample_size, vae.config.sample_tsize, vae.config.tile_overlap_factor)
    return compare_frames(*(pictures(video, mean, deviation) for video in videos.values()), tiles)


def pictures(video: Tensor, mean: float, deviation: float) -> Iterator[np.ndarray]:
    """[3, F, H, W] -> frames as users see them, uint8 [H, W, 3]."""
    for frame in video.unbind(1):
        shown = ((frame.float() - mean) / deviation / 2 + 0.5).clamp(0, 1)
        yield to_uint8(shown.permute(1, 2, 0).contiguous().numpy()[None])[0]


def row(latent: str, name: str, seam: Seam) -> str:
    above = "yes" if seam.stands_out else "no"
    return (
        f"| {latent} | {name} | {seam.axis} | {seam.kind} | {seam.own:.2f} | {seam.mean:.2f} | "
        f"{seam.most:.2f} at {seam.worst} | {seam.most_inside:.2f} ({seam.limit:.2f}) | {above} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", metavar="WxH")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--full", action="store_true", help="full width on a CPU too")
    parser.add_argument("--tile", nargs=2, type=int, metavar=("PIXELS", "FRAMES"))
    parser.add_argument("--model", type=Path, help="a model folder, for its VAE")
    parser.add_argument("--per-frame", action="store_true", help="the brightness error and jumps of each frame")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    large = device.type == "cuda"
    width, height = map(int, (options.size or ("1280x720" if large else "448x320")).split("x"))
    frames = options.frames or (129 if large else 57)
    pixels_frames = options.tile or ((256, 64) if large else (128, 32))
    widths = {} if options.full or large else NARROW
    config = VaeConfig(sample_size=pixels_frames[0], sample_tsize=pixels_frames[1], **widths)
    vae = Vae(options.model, config, device)
    print(
        f"{describe(device)}; {width}x{height}x{frames}, widths {vae.config.block_out_channels}, tiles "
        f"{vae.config.sample_size}/{vae.config.sample_tsize}\n"
    )
    results = {}
    for name in options.latents:
        results[name] = measured(vae, vae.latents(name, (frames - 1) // 4 + 1, height // 8, width // 8))
    print("| latent | video | axis | measure | inside, levels | borders | most | inside, most (limit) | stands out |")
    print("|---|---|---|---|---|---|---|---|---|")
    for latent, result in results.items():
        for key, policy in {"a": "seamless", "b": "reference", "b - a": "reference - seamless"}.items():
            for seam in result.seams[key]:
                print(row(latent, policy, seam))
    for latent, result in results.items():
        print(f"\n{latent}, reference (b) against seamless (a):")
        print("\n".join(line for line in result.lines() if not line.startswith("seams")))
        if options.per_frame:
            print("\n".join(result.table()))


if __name__ == "__main__":
    main()
