"""Finished latents on disk, so that a video can be decoded later, again, or after a crash.

A safetensors file with one tensor, `latents` float32 [16, T, h, w] as the sampler left them (times the VAE's scaling
factor), and in its metadata the settings that the mp4 will carry: frames, fps and size, and under `about` the model
folder and the variant.

Invariants: the file appears whole or not at all, and reads back bit for bit; one that is damaged, is no latents file
or does not fit its own settings is refused from its header. No torch at import. Left out: runs that stopped midway.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_i2v.errors import CheckpointError, RequestError, ResourceError
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.safetensors_file import SafetensorsFile, open_safetensors
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import VARIANTS, Variant
from lowvram_i2v.whole_file import replacing

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "lowvram-i2v latents 1"  # the number changes when older programs cannot read the file
SUFFIX = ".latents.safetensors"
REMEDY = "Name a file that `lowvram-i2v generate` left: OUTPUT.mp4.latents.safetensors."


@dataclass(frozen=True)
class LatentsFile:
    """A latents file's header, checked; `read` fetches the latents.

    settings: what `GenerateRequest.to_settings` wrote. variant: of the weights that made the latents, which says how
    many decoded frames are dropped. model: the folder that they lay in, None if the file does not say.
    """

    file: SafetensorsFile
    settings: dict[str, Any]
    variant: Variant
    model: Path | None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        """[channels, T, h, w]"""
        return self.file.entries["latents"].shape

    def request(self, output: Path) -> GenerateRequest:
        """The request that these latents answer, with another output. The same object's `to_settings` repeats it."""
        return GenerateRequest.from_settings(self.settings, output)

    def read(self) -> Tensor:
        """The latents, float32, on the CPU. Raises CheckpointError if the file is cut or holds values that are no
        numbers."""
        latents = self.file.read("latents")
        if not latents.isfinite().all():
            raise CheckpointError(f"{self.path} holds values that are not numbers", "Generate the video again.")
        return latents


def latents_path(output: Path) -> Path:
    """Where the latents of a video lie until it is finished: OUTPUT.mp4.latents.safetensors."""
    return output.with_name(output.name + SUFFIX)


def output_of(latents: Path) -> Path | None:
    """The inverse of `latents_path`; None for a file of another name."""
    name = latents.name.removesuffix(SUFFIX)
    return latents.with_name(name) if name and name != latents.name else None


def save_latents(path: Path, latents: Tensor, settings: dict[str, Any]) -> None:
    """Writes latents [16, T, h, w] from any device, with the settings of `GenerateRequest.to_settings`, whose `about`
    names `variant` and `model`. Replaces what was there. Raises ResourceError if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    metadata = {"format": FORMAT, "settings": json.dumps(settings)}
    try:
        with replacing(path) as part:
            part.write_bytes(save({"latents": latents.detach().float().cpu().contiguous()}, metadata))
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{path} ({latents.numel() * 4 >> 20} MiB of latents) cannot be written: {error}.",
            "Free some space or write to another disk.",
        ) from error


def open_latents(path: Path) -> LatentsFile:
    """Reads and checks the header. Raises CheckpointError for a missing, cut or damaged file, RequestError for one
    that is no latents file, whose settings this version does not know or that contradicts them."""
    file = open_safetensors(path)
    if file.metadata.get("format") != FORMAT:
        said = file.metadata.get("format", "")
        newer = f" (it says {said!r}, this program reads {FORMAT!r})" if said.startswith(FORMAT[:-1]) else ""
        raise RequestError(f"{path} is not a file of latents{newer}.", REMEDY)
    try:
        settings = json.loads(file.metadata["settings"])
        about = settings["about"]
        variant = VARIANTS[about["variant"]]
        model = about.get("model")
        entry = file.entries["latents"]
        shape = entry.shape
        _, _, _, _ = shape
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"{path} is not a file of latents as this program writes it ({error!r:.200}).", REMEDY
        ) from error
    request = GenerateRequest.from_settings(settings, Path("out.mp4"))
    expected = _latent_shape(request)
    if entry.dtype != "F32" or shape[1:] != expected:
        raise RequestError(
            f"{path} holds {entry.dtype} latents {list(shape)}; its settings, {request.frames} frames of size "
            f"{request.size}, ask for F32 [{shape[0]}, {', '.join(map(str, expected))}].",
            REMEDY,
        )
    return LatentsFile(file, settings, variant, Path(model) if isinstance(model, str) else None)


def _latent_shape(request: GenerateRequest) -> tuple[int, ...]:
    """[T, h, w] of a request; empty if it leaves the size open."""
    if request.size is None:
        return ()
    width, height = request.size
    time, space = VaeConfig().time_ratio, VaeConfig().spatial_ratio
    return (request.frames - 1) // time + 1, height // space, width // space
