"""Stage 4, the VAE's decoder alone: sharper pictures from the latents that the transformer already makes.

The encoder stays what it was, so the latents do too: this stage may run before, after or beside the transformer's. It
sees latents as the sampler ends with them, the picture's and then the video's. Squared error weighs more than in stage
1: edges are already right.

Result: the moving average of the decoder, which `vae.load` puts in the place of stage 1's, and a new `vae.png`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.train_demo import batched_vae, vae
from tools.train_demo.batched_vae import Way
from tools.train_demo.clips import Clips, Window
from tools.train_demo.loop import Losses, Run, Training, generators
from tools.train_demo.sizes import Recipe

SQUARED = 10.0


def train(recipe: Recipe, clips: Clips, run: Run) -> None:
    """Trains until the time is up. Raises SystemExit if stage 1 has not been trained."""
    stage = recipe.decoder
    torch.manual_seed(run.seed)
    clips.ahead(0)
    model = vae.load(recipe.size.vae, run)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    training = Training("decoder", model, stage, run)
    if training.over:
        return
    window = Window(clips, lambda number: vae.frames_of(clips, number, run), stage.chunk_steps, stage.most_chunks)
    held_out = vae.examined(recipe, clips, run)

    def losses_with(videos: Tensor, noise: torch.Generator, way: Way) -> Losses:
        return step_losses(model, videos, noise, way)

    def losses_of(step: int) -> Losses:
        choices, noise = generators(run, step)
        frames = window.draw(step, choices)["frames"]
        return losses_with(vae.batch(frames, stage, training.progress, choices), noise, way)

    way = vae.fastest(training, window, run, losses_with)
    training.run(losses_of, lambda: {"held-out dB": vae.round_trip(model, held_out, way)})
    vae.draw(recipe, clips, run)


def step_losses(model: vae.Vae, videos: Tensor, noise: torch.Generator, way: Way) -> Losses:
    """videos: uint8 [n, F, H, W, 3]."""
    wanted = vae.as_floats(videos)
    with torch.no_grad():
        mean, logvar = batched_vae.encode(model, wanted, way)
        first, first_logvar = batched_vae.encode(model, wanted[:, :, :1], way)
        mean, logvar = torch.cat([first, mean[:, :, 1:]], 2), torch.cat([first_logvar, logvar[:, :, 1:]], 2)
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise, device=mean.device)
    return vae.picture_losses(batched_vae.decode(model, latents, way), wanted, SQUARED)
