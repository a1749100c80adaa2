"""Stage 1, the video VAE: mean absolute error, sharpness of edges, a little KL.

The loss has no perceptual network and no adversary: nothing is downloaded, and the drawn world has few textures to
hallucinate. `sharpness` compares neighbour differences, which a blurred edge misses by much and a mean error by little.

Group norm makes a picture's latent differ from the first latent of its video, and the sampler puts the picture's there.
So half of the steps decode the picture's latent followed by the video's others: the decoder learns both.

Result: the moving average, and `vae.json`, the config with the measured scaling factor (1 / standard deviation).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from tools.train_demo.clips import Clips, Window
from tools.train_demo.loop import Losses, Run, Training, autocast, averaged, generators
from tools.train_demo.sizes import Recipe, Stage

SHARPNESS, SQUARED, KL = 0.5, 1.0, 3e-4
SHORT = 17  # frames of the clips of three steps in four
MEASURED = 16  # clips of the scaling factor


class Vae(nn.Module):
    """Encoder and decoder side by side; tensor names are the released file's."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        encoder, decoder = VaeEncoder(config), VaeDecoder(config)
        self.encoder, self.quant_conv = encoder.encoder, encoder.quant_conv
        self.decoder, self.post_quant_conv = decoder.decoder, decoder.post_quant_conv
        self._encode, self._decode = [encoder], [decoder]  # in lists: not registered twice

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode[0].encode(video)

    def decode(self, latent: Tensor) -> Tensor:
        return self._decode[0].decode(latent)

    def latents(self, video: Tensor) -> Tensor:
        """[3, F, H, W] in -1..1 -> [16, T, h, w], unscaled: the means, and in front that of the first frame alone."""
        return torch.cat([self.encode(video[:, :1])[0], self.encode(video)[0][:, 1:]], dim=1)


def train(recipe: Recipe, clips: Clips, run: Run) -> None:
    """Trains until the time is up; when all steps are done, measures the scaling factor."""
    stage = recipe.vae
    torch.manual_seed(run.seed)
    training = Training("vae", Vae(recipe.size.vae), stage, run)
    model = training.model
    assert isinstance(model, Vae)
    window = Window(clips, lambda number: _frames(clips, number, run), stage.chunk_steps, stage.most_chunks)

    def losses_of(step: int) -> Losses:
        choices, noise = generators(run, step)
        frames = window.draw(step, choices)["frames"]
        return step_losses(model, _batch(frames, stage, choices), choices, noise)

    training.run(losses_of)
    measure(recipe, clips, run)


def step_losses(model: Vae, videos: Tensor, choices: torch.Generator, noise: torch.Generator) -> Losses:
    """videos: uint8 [n, F, H, W, 3]. One after the other: the modules know no batch, a clip fills a GPU."""
    picture_first = bool(torch.rand((), generator=choices) < 0.5)
    sums: dict[str, Tensor] = {}
    for video in videos:
        for name, value in clip_losses(model, as_floats(video), picture_first, noise).items():
            sums[name] = sums.get(name, 0) + value / len(videos)
    return sums


def clip_losses(model: Vae, video: Tensor, picture_first: bool, noise: torch.Generator) -> Losses:
    """video: [3, F, H, W] in -1..1."""
    with autocast(video.device):
        mean, logvar = model.encode(video)
        latent = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise, device=mean.device)
        if picture_first:
            latent = torch.cat([model.encode(video[:, :1])[0], latent[:, 1:]], dim=1)
        made = model.decode(latent)
    absolute, squared = F.l1_loss(made, video), F.mse_loss(made, video)
    edges, kl = sharpness(made, video), 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    total = absolute + SQUARED * squared + SHARPNESS * edges + KL * kl
    return {"loss": total, "l1": absolute, "edges": edges, "kl": kl, "psnr": -10 * torch.log10(squared.detach() / 4)}


def sharpness(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours along rows and columns."""
    return sum(F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis)) for axis in (-1, -2))  # type: ignore[return-value]


def as_floats(video: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> float [3, F, H, W] in -1..1."""
    return video.permute(3, 0, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def measure(recipe: Recipe, clips: Clips, run: Run) -> None:
    """Writes vae.json."""
    model = load(recipe.size.vae, run)
    frames = clips.get(0).frames[:MEASURED].to(run.device)
    latents = torch.cat([model.latents(as_floats(video)).flatten() for video in frames])
    config = replace(recipe.size.vae, scaling_factor=round(1 / float(latents.std()), 6))
    (run.work / "vae.json").write_text(json.dumps(config.to_official(), indent=1))
    print(f"vae: scaling factor {config.scaling_factor}", flush=True)


def load(config: VaeConfig, run: Run) -> Vae:
    """The trained VAE for use."""
    model = Vae(config)
    model.load_state_dict(averaged(run.work, "vae"))
    return model.to(run.device).eval().requires_grad_(False)


def trained_config(work: Path) -> VaeConfig:
    """With the measured scaling factor."""
    return VaeConfig.from_official(json.loads((work / "vae.json").read_text()))


def _frames(clips: Clips, number: int, run: Run) -> dict[str, Tensor]:
    return {"frames": clips.get(number).frames.to(run.device)}


def _batch(frames: Tensor, stage: Stage, choices: torch.Generator) -> Tensor:
    """Some clips: three steps in four a short piece of each, else half as many whole ones."""
    long = bool(torch.rand((), generator=choices) < 0.25)
    count = max(1, stage.batch // 2) if long else stage.batch
    picked = frames[torch.randint(len(frames), (count,), generator=choices).to(frames.device)]
    if long or picked.shape[1] <= SHORT:
        return picked
    start = int(torch.randint(picked.shape[1] - SHORT + 1, (), generator=choices))
    return picked[:, start : start + SHORT]
