"""A look at the video while it is sampled: a small animated WebP beside the output, rewritten every few steps.

What is shown is where the sampler is heading, not the noisy latents it has: with x = (1 - sigma) video + sigma noise,
two neighbouring steps give the velocity, and x - sigma velocity is the model's present idea of the video.

Invariants: a preview never fails a run and never changes one: what goes wrong becomes a Notice, and latents are only
read. It costs a copy to the host at the steps that are shown, none at the others. Left out: showing the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lowvram_i2v.checkpoint import mismatches, raise_listed
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import Listener, Notice
from lowvram_i2v.safetensors_file import open_safetensors
from lowvram_i2v.vae.preview import TinyDecoder, linear_rgb
from lowvram_i2v.whole_file import replacing

LONG_SIDE = 384  # pixels of the preview
QUALITY = 75  # WebP's, of 100
FRAMES_A_LATENT = 4
PICKLES = (".pth", ".pt", ".bin")
REMEDY = "Give taehv.safetensors or taehv.pth of github.com/madebyollin/taehv."


def preview_path(output: Path) -> Path:
    """OUTPUT.mp4.preview.webp"""
    return output.with_name(output.name + ".preview.webp")


class PreviewWriter:
    """Called after every step with its number, from 1, and the latents: the form of `denoise`'s `on_step`.

    sigmas: the schedule, steps + 1 values from 1 to 0. every: steps between previews; the last step always gives one.
    A first step alone shows nothing, it has no neighbour. fps: of the video. decoder: TAEHV, of which a copy in `dtype`
    is made on the device of the latents; without it, or once memory has run out, the matrix of `linear_rgb`.
    """

    def __init__(
        self,
        path: Path,
        sigmas: Sequence[float],
        every: int,
        fps: int,
        listen: Listener,
        decoder: TinyDecoder | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if every < 1:
            raise RequestError(f"--preview is {every!r}.", "Give the number of steps between previews, 1 or more.")
        self.path = path
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.every = every
        self.duration = round(1000 * FRAMES_A_LATENT / fps)  # milliseconds of one picture
        self.listen = listen
        self.decoder, self.dtype = decoder, dtype
        self.failed, self._moved = False, False
        self._before: Tensor | None = None

    def __call__(self, step: int, latents: Tensor) -> None:
        """latents [16, T, h, w], float32; the reference is kept until the next step."""
        before, self._before = self._before, latents if self._is_due(step + 1) else None
        if not self._is_due(step) or self.failed:
            return
        sigma = self.sigmas[step]
        if sigma == 0:
            self._show(latents)
        elif before is not None:
            self._show(heading(before, latents, self.sigmas[step - 1], sigma))

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == len(self.sigmas) - 1

    def _show(self, latents: Tensor) -> None:
        try:
            write_preview(self.path, self._pictures(latents), self.duration)
        except OSError as error:
            self.failed = True
            self.listen(Notice(f"There will be no previews: {self.path} cannot be written ({error})."))
        except torch.OutOfMemoryError:
            self.failed = True
            self.listen(Notice("There will be no previews: too little video memory is left for them."))

    @torch.inference_mode()
    def _pictures(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """uint8 [T, H, W, 3]"""
        if self.decoder is not None:
            try:
                if not self._moved:
                    self.decoder, self._moved = deepcopy(self.decoder).to(latents.device, self.dtype), True
                small = [_small(frame) for frame in self.decoder.decode(latents, every_frame=False)]
                return _to_host(torch.stack(small))
            except torch.OutOfMemoryError:
                self.decoder = None
                self.listen(Notice("Too little video memory for --preview-vae: the previews go on without it."))
        return _to_host(_small(linear_rgb(latents)))


def heading(before: Tensor, latents: Tensor, sigma_before: float, sigma: float) -> Tensor:
    """The noise-free latents at the end of the straight line through two steps' latents."""
    velocity = (latents - before) / (sigma - sigma_before)
    return latents - sigma * velocity


def write_preview(path: Path, pictures: npt.NDArray[np.uint8], duration: int) -> None:
    """Pictures [T, H, W, 3] as an animated WebP that repeats, `duration` milliseconds each. Raises OSError."""
    first, *others = [Image.fromarray(picture) for picture in pictures]
    options: dict[str, Any] = {"duration": duration, "loop": 0, "quality": QUALITY, "method": 0}
    with replacing(path) as part:
        first.save(part, "WEBP", save_all=True, append_images=others, **options)


def load_tiny_decoder(path: Path, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """TAEHV's decoder from its released file, safetensors or pickle. Raises CheckpointError for what it is not."""
    with torch.device("meta"):
        decoder = TinyDecoder()
    weights = _read_pickle(path) if path.suffix.lower() in PICKLES else _read_safetensors(path)
    actual = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    faults = mismatches(actual, expected, extra_ok=lambda name: name.startswith("encoder."))
    raise_listed(f"--preview-vae {path} is not TAEHV for HunyuanVideo", faults, REMEDY)
    decoder.load_state_dict({name: weights[name].to(device, dtype) for name in expected}, assign=True)
    return decoder.eval().requires_grad_(False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    file = open_safetensors(path)
    return {name: file.read(name) for name in file.entries}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
            raise TypeError("it holds something other than tensors")
    except Exception as error:  # a damaged pickle raises anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "weights_only" in said or "Weights only" in said:  # torch goes on to recommend the loader that runs code
            said = "it holds something other than tensors"
        raise CheckpointError(f"--preview-vae {path} cannot be read: {said:.300}", REMEDY) from error
    return values


def _small(pictures: Tensor) -> Tensor:
    """[3, H, W] or [T, 3, H, W], scaled so that the longer side is LONG_SIDE, both sides even."""
    height, width = pictures.shape[-2:]
    scale = LONG_SIDE / max(height, width)
    size = tuple(max(2, 2 * round(side * scale / 2)) for side in (height, width))
    batch = pictures if pictures.dim() == 4 else pictures[None]
    scaled = F.interpolate(batch, size=size, mode="bilinear", antialias=scale < 1)
    return scaled if pictures.dim() == 4 else scaled[0]


def _to_host(pictures: Tensor) -> npt.NDArray[np.uint8]:
    """[T, 3, H, W] in 0..1 -> uint8 [T, H, W, 3]; what is no number is black."""
    values = pictures.nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(0, 2, 3, 1).cpu().numpy())
