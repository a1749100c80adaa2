"""Stage 3, the transformer: flow matching on the VAE's latents, conditioned exactly as inference conditions.

x = (1 - sigma) * video + sigma * noise, the model predicts noise - video (what the Euler loop follows). The first
latent frame is the picture's, clean, its tokens have t = 0, and it takes no part in the loss. sigma is uniform, then
shifted as the sampler shifts it, by less: a shift of SHIFT puts half of the steps above 0.75, where what moves where is
decided, and still shows the last steps. Guidance is always GUIDANCE: the weights learn one value, a request's default.
One prompt in DROPPED is replaced by the negative one of inference (empty, with a black picture), for true CFG.

Latents and prompt rows are computed once for each clip and kept on disk; the folder's name is the encoders' state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.dit.blocks import Rope
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.sampling.schedule import TIMESTEPS
from tools.train_demo import text, vae
from tools.train_demo.batched_vae import picture_latents, plain_way
from tools.train_demo.batched import Prompts, velocity
from tools.train_demo.clips import Clips, Window, save
from tools.train_demo.loop import Losses, Run, Training, autocast, averaged, generators
from tools.train_demo.sizes import GUIDANCE, Recipe

SHIFT = 3.0
DROPPED = 0.1
AT_ONCE = 16  # clips that are encoded
ROWS_STEP = 16  # padded prompts come in few lengths, so that a compiled model does too


@dataclass(frozen=True)
class Encoders:
    """The frozen results of the first two stages. nothing: the negative prompt."""

    vae: vae.Vae
    scaling_factor: float
    text: text.TextEncoders
    nothing: Prompts


def train(recipe: Recipe, clips: Clips, run: Run, compiled: bool = False) -> None:
    stage, config = recipe.flow, recipe.size.transformer
    torch.manual_seed(run.seed)
    training = Training("flow", start(config), stage, run)
    model = training.model
    assert isinstance(model, HunyuanVideoTransformer)
    forward = torch.compile(velocity) if compiled else velocity
    encoders, folder = load_encoders(recipe, run), latents_folder(run.work)
    ropes: dict[tuple[int, ...], Rope] = {}

    def make(number: int) -> dict[str, Tensor]:
        path = folder / f"{number:05d}.pt"
        if not path.is_file():
            save(encode(clips, number, encoders, run), path)
        loaded = torch.load(path, weights_only=True)
        return {key: value.to(run.device) for key, value in loaded.items()}

    window = Window(
        clips, make, stage.chunk_steps, stage.most_chunks, lambda number: (folder / f"{number:05d}.pt").is_file()
    )

    def losses_of(step: int) -> Losses:
        choices, noise = generators(run, step)
        chunk = window.draw(step, choices)
        index = torch.randint(len(chunk["latents"]), (stage.batch,), generator=choices).to(run.device)
        latents = chunk["latents"][index].float()
        prompts = Prompts(*(chunk[key][index] for key in ("rows", "lengths", "pooled")))
        prompts = dropped(prompts, encoders.nothing, noise)
        rope = _rope(ropes, config, tuple(latents.shape[2:]), run.device)
        noised, sigmas, wanted = disturb(latents, noise)
        with autocast(run.device):
            made = forward(model, noised, sigmas * TIMESTEPS, prompts, GUIDANCE, rope)
        return flow_losses(made, wanted, sigmas)

    training.run(losses_of)


def start(config: TransformerConfig) -> HunyuanVideoTransformer:
    """Every block begins as the identity and the result as zero: modulation and last layer are zero."""
    model = HunyuanVideoTransformer(config)
    for name, parameter in model.named_parameters():
        if "_mod." in name or "modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.zeros_(parameter)
    return model


def disturb(latents: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """[n, 16, T, h, w] -> what the model sees, sigma [n], and the velocity it is to predict."""
    u = torch.rand(len(latents), generator=noise, device=latents.device)
    sigmas = SHIFT * u / (1 + (SHIFT - 1) * u)
    drawn = torch.randn(latents.shape, generator=noise, device=latents.device)
    share = sigmas[:, None, None, None, None]
    noised = (1 - share) * latents + share * drawn
    noised = torch.cat([latents[:, :, :1], noised[:, :, 1:]], dim=2)
    return noised, sigmas, drawn - latents


def flow_losses(made: Tensor, wanted: Tensor, sigmas: Tensor) -> Losses:
    """Mean squared error of all frames but the first; also of the noisy and of the clean half of the batch."""
    errors = (made - wanted)[:, :, 1:].square().mean((1, 2, 3, 4))
    high = sigmas > 0.75
    parts = {"noisy": high, "clean": ~high}
    logged = {name: (errors * of).sum().detach() / of.sum().clamp(min=1) for name, of in parts.items()}
    return {"loss": errors.mean(), **logged}


def dropped(prompts: Prompts, nothing: Prompts, noise: torch.Generator) -> Prompts:
    """Some prompts replaced by the negative one."""
    n, longest = prompts.rows.shape[:2]
    gone = torch.rand(n, generator=noise, device=prompts.rows.device) < DROPPED
    rows = F.pad(nothing.rows, (0, 0, 0, longest - nothing.rows.shape[1]))
    return Prompts(
        torch.where(gone[:, None, None], rows, prompts.rows),
        torch.where(gone, nothing.lengths, prompts.lengths),
        torch.where(gone[:, None], nothing.pooled, prompts.pooled),
    )


def load_encoders(recipe: Recipe, run: Run) -> Encoders:
    """Raises SystemExit if a stage before this one has not been trained."""
    config = vae.trained_config(run.work)
    encoders = text.load(run)
    black = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    encoded = encoders.encode([""], black)
    nothing = Prompts(encoded.rows, encoded.lengths, encoded.pooled)
    return Encoders(vae.load(recipe.size.vae, run), config.scaling_factor, encoders, nothing)


@torch.no_grad()
def encode(clips: Clips, number: int, encoders: Encoders, run: Run) -> dict[str, Tensor]:
    """A chunk's scaled latents (half precision, CPU) and its prompts."""
    chunk = clips.get(number)
    way = plain_way(run.device)
    latents = [
        picture_latents(encoders.vae, vae.as_floats(few.to(run.device)), way) for few in chunk.frames.split(AT_ONCE)
    ]
    prompts = encoders.text.encode(chunk.prompts, chunk.frames[:, 0])
    longest = prompts.rows.shape[1]
    rows = F.pad(prompts.rows, (0, 0, 0, -longest % ROWS_STEP))
    return {
        "latents": (torch.cat(latents) * encoders.scaling_factor).half().cpu(),
        "rows": rows.cpu(),
        "lengths": prompts.lengths.cpu(),
        "pooled": prompts.pooled.cpu(),
    }


def latents_folder(work: Path) -> Path:
    """Its name changes with the weights of VAE and text encoders, so that no stale latent is read."""
    digest = hashlib.sha256()
    for name in ("vae", "text"):
        for key, value in averaged(work, name).items():
            digest.update(key.encode() + value.contiguous().numpy().tobytes())
    folder = work / f"latents-{digest.hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    return folder


def _rope(
    ropes: dict[tuple[int, ...], Rope], config: TransformerConfig, shape: tuple[int, ...], device: torch.device
) -> Rope:
    """The table for latents [T, h, w], made once."""
    if shape not in ropes:
        time, height, width = (size // patch for size, patch in zip(shape, config.patch_size, strict=True))
        frames = 4 * (time - 1) + 1
        cos, sin = rope_table((time, height, width), config.rope_dims, config.rope_theta, frames)
        ropes[shape] = cos.to(device), sin.to(device)
    return ropes[shape]
