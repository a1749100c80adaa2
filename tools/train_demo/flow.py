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
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.dit.blocks import Rope
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.sampling.schedule import TIMESTEPS, flow_sigmas
from tools.train_demo import text, vae
from tools.train_demo.batched import Prompts, velocity
from tools.train_demo.batched_vae import decode, picture_latents, plain_way
from tools.train_demo.clips import Chunk, Clips, Window, save
from tools.train_demo.loop import Losses, Run, Training, autocast, averaged, generators
from tools.train_demo.sheet import write_sheet
from tools.train_demo.sizes import GUIDANCE, Recipe

SHIFT = 3.0
SAMPLED, SAMPLED_SHIFT = 20, 7.0  # steps and shift of the sheet
DROPPED = 0.1
AT_ONCE = 16  # clips that are encoded
ROWS_STEP = 48  # padded prompts come in one length, so that a compiled model does too
EXAMINED, SHOWN = 16, 2  # held-out clips of each size: judged, on the sheet


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
    if training.over:
        return
    encoders, folder = load_encoders(recipe, run), latents_folder(run.work)
    ropes: dict[tuple[int, ...], Rope] = {}

    def kept(number: int) -> Path:
        return folder / f"{number:05d}.pt"

    def make(number: int) -> dict[str, Tensor]:
        if not kept(number).is_file():
            save(encode(clips.get(number), encoders, run), kept(number))
        return _on(torch.load(kept(number), weights_only=True), run.device)

    window = Window(clips, make, stage.chunk_steps, stage.most_chunks, lambda number: kept(number).is_file())

    def losses(latents: Tensor, prompts: Prompts, noise: torch.Generator, compiled: bool = False) -> Losses:
        rope = rope_of(ropes, config, latents)
        noised, sigmas, wanted = disturb(latents, noise)
        with autocast(run.device):
            made = velocity(model, noised, sigmas * TIMESTEPS, prompts, GUIDANCE, rope, compiled)
        return flow_losses(made, wanted, sigmas)

    def losses_of(step: int) -> Losses:
        choices, noise = generators(run, step)
        chunk = window.draw(step, choices)
        index = torch.randint(len(chunk["latents"]), (stage.batch,), generator=choices)
        picked = _picked(chunk, on_device(index, run.device))
        return losses(chunk_latents(picked), dropped(_prompts(picked), encoders.nothing, noise), noise, compiled)

    held_out = clips.held_out(min(EXAMINED, recipe.clips_per_chunk))
    judged = [_on(encode(chunk, encoders, run), run.device) for chunk in held_out]

    def examine() -> dict[str, float]:
        noise = torch.Generator(run.device).manual_seed(0)
        found = [losses(chunk_latents(chunk), _prompts(chunk), noise) for chunk in judged]
        return {f"held-out {name}": sum(float(one[name]) for one in found) / len(found) for name in found[0]}

    training.run(losses_of, examine)
    with training.averaged_weights():
        shown = [_picked(chunk, torch.arange(min(SHOWN, len(chunk["latents"])))) for chunk in judged]
        made = [sample(model, encoders, chunk_latents(chunk), _prompts(chunk), run) for chunk in shown]
    originals = [video for chunk in held_out for video in chunk.frames[:SHOWN]]
    animated = [video.cpu() for videos in made for video in videos]
    write_sheet([(a.numpy(), b.numpy()) for a, b in zip(originals, animated, strict=True)], run.work / "flow.png")


@torch.no_grad()
def sample(model: HunyuanVideoTransformer, encoders: Encoders, latents: Tensor, prompts: Prompts, run: Run) -> Tensor:
    """Videos that begin like these latents, uint8 [n, F, H, W, 3]: the Euler loop of inference, for a batch."""
    rope = rope_of({}, model.config, latents)
    noise = torch.Generator(run.device).manual_seed(0)
    x = torch.randn(latents.shape, generator=noise, device=latents.device)
    sigmas = flow_sigmas(SAMPLED, SAMPLED_SHIFT).tolist()
    for sigma, following in pairwise(sigmas):
        x = torch.cat([latents[:, :, :1], x[:, :, 1:]], dim=2)
        times = torch.full((len(x),), sigma * TIMESTEPS, device=x.device)
        with autocast(run.device):
            x = x + (following - sigma) * velocity(model, x, times, prompts, GUIDANCE, rope).float()
    x = torch.cat([latents[:, :, :1], x[:, :, 1:]], dim=2)
    return vae.as_bytes(decode(encoders.vae, x / encoders.scaling_factor, plain_way(run.device)))


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
def encode(chunk: Chunk, encoders: Encoders, run: Run) -> dict[str, Tensor]:
    """A chunk's scaled latents (half precision, CPU) and its prompts."""
    way = plain_way(run.device)
    latents = [
        picture_latents(encoders.vae, vae.as_floats(few.to(run.device)), way)
        for few in torch.split(chunk.frames, AT_ONCE)
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


def chunk_latents(chunk: dict[str, Tensor]) -> Tensor:
    return chunk["latents"].float()


def on_device(index: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the GPU still has to do."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def rope_of(ropes: dict[tuple[int, ...], Rope], config: TransformerConfig, latents: Tensor) -> Rope:
    """The table for latents [n, 16, T, h, w], made once."""
    shape = tuple(latents.shape[2:])
    if shape not in ropes:
        time, height, width = (size // patch for size, patch in zip(shape, config.patch_size, strict=True))
        frames = 4 * (time - 1) + 1
        cos, sin = rope_table((time, height, width), config.rope_dims, config.rope_theta, frames)
        ropes[shape] = cos.to(latents.device), sin.to(latents.device)
    return ropes[shape]


def _prompts(chunk: dict[str, Tensor]) -> Prompts:
    return Prompts(chunk["rows"], chunk["lengths"], chunk["pooled"])


def _picked(chunk: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {key: value[index] for key, value in chunk.items()}


def _on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in tensors.items()}
