"""Stage 3, the transformer: flow matching on the VAE's latents, conditioned exactly as inference conditions.

x = (1 - sigma) * video + sigma * noise, the model predicts noise - video (what the Euler loop follows). The first
latent frame is the picture's, clean, its tokens have t = 0, and it takes no part in the loss. sigma is uniform, each
clip of a batch in a share of its own, then shifted as the sampler shifts it, by less. Picture and prompt decide what
moves where; above 0.9 or so the noise hides it and the model has to read them, and a shift of SHIFT puts a third of the
steps there. Guidance is always GUIDANCE: the weights learn one value, a request's default. One prompt in 1 / DROPPED is
replaced by the negative one of inference (empty, with a black picture), for true CFG.

Latents and prompt rows come from `latents.py`; a step is recorded once and replayed (`replay.py`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.dit.blocks import Rope
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.sampling.schedule import TIMESTEPS, flow_sigmas
from tools.train_demo import vae
from tools.train_demo.batched import Prompts, velocity
from tools.train_demo.batched_vae import decode, plain_way
from tools.train_demo.clips import Clips, Window
from tools.train_demo.latents import Encoders, Latents, encode, load_encoders
from tools.train_demo.loop import Losses, Run, Training, autocast, generators
from tools.train_demo.replay import Replayed
from tools.train_demo.sheet import write_sheet
from tools.train_demo.sizes import GUIDANCE, Recipe

SHIFT = 5.0
SAMPLED, SAMPLED_SHIFT = 20, 7.0  # steps and shift of the sheet
DROPPED = 0.05
EXAMINED, SHOWN = 16, 2  # held-out clips of each size: judged, on the sheet


def train(recipe: Recipe, clips: Clips, run: Run, compiled: bool = False) -> None:
    stage, config = recipe.flow, recipe.size.transformer
    torch.manual_seed(run.seed)
    training = Training("flow", start(config), stage, run)
    model = training.model
    assert isinstance(model, HunyuanVideoTransformer)
    if training.over:
        return
    encoders = load_encoders(recipe, run)
    with Latents(recipe, clips, run, encoders) as latents:
        _train(training, model, recipe, clips, latents, encoders, compiled)


def _train(
    training: Training,
    model: HunyuanVideoTransformer,
    recipe: Recipe,
    clips: Clips,
    latents: Latents,
    encoders: Encoders,
    compiled: bool,
) -> None:
    run, stage = training.run_, recipe.flow
    latents.ahead(training.step // stage.chunk_steps)
    losses = Losing(model, compiled)
    replayed = Replayed(losses, training.weights)
    held_out = clips.held_out(min(EXAMINED, recipe.clips_per_chunk))
    judged = [on(encode(chunk, encoders, run), run.device) for chunk in held_out]
    for chunk in judged:
        some = picked(chunk, torch.zeros(stage.batch, dtype=torch.long, device=run.device))
        replayed.prepare(*step_inputs(some, encoders.nothing, generators(run, 0)[1]))
    patient = run.device.type == "cpu" and not run.finish  # others do not end in the same bits anyway
    window = Window(latents, latents.get, stage.chunk_steps, stage.most_chunks, latents.kept, patient)

    def losses_of(step: int) -> Losses:
        choices, noise = generators(run, step)
        chunk = window.draw(step, choices)
        index = torch.randint(len(chunk["latents"]), (stage.batch,), generator=choices)
        return replayed(*step_inputs(picked(chunk, on_device(index, run.device)), encoders.nothing, noise))

    def examine() -> dict[str, float]:
        noise = torch.Generator(run.device).manual_seed(0)
        found = [losses(*disturb(chunk_latents(chunk), noise), *_prompts(chunk).tensors()) for chunk in judged]
        means = {f"held-out {name}": sum(float(one[name]) for one in found) / len(found) for name in found[0]}
        return means | {"chunks": window.count}

    training.run(losses_of, examine)
    with training.averaged_weights():
        shown = [picked(chunk, torch.arange(min(SHOWN, len(chunk["latents"])))) for chunk in judged]
        made = [sample(model, encoders, chunk_latents(chunk), _prompts(chunk), run) for chunk in shown]
    originals = [video for chunk in held_out for video in chunk.frames[:SHOWN]]
    animated = [video.cpu() for videos in made for video in videos]
    write_sheet([(a.numpy(), b.numpy()) for a, b in zip(originals, animated, strict=True)], run.work / "flow.png")


class Losing:
    """What a model loses on a batch that is disturbed already: a function of tensors alone."""

    def __init__(self, model: HunyuanVideoTransformer, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self._ropes: dict[tuple[int, ...], Rope] = {}

    def __call__(
        self, noised: Tensor, sigmas: Tensor, wanted: Tensor, rows: Tensor, lengths: Tensor, pooled: Tensor
    ) -> Losses:
        """As `disturb` and `Prompts` have them. Compiled only where gradients are wanted."""
        model, rope = self._model, rope_of(self._ropes, self._model.config, noised)
        compiled, prompts = self._compiled and torch.is_grad_enabled(), Prompts(rows, lengths, pooled)
        with autocast(noised.device):
            made = velocity(model, noised, sigmas * TIMESTEPS, prompts, GUIDANCE, rope, compiled)
        return flow_losses(made, wanted, sigmas)


def step_inputs(chunk: dict[str, Tensor], nothing: Prompts, noise: torch.Generator) -> tuple[Tensor, ...]:
    """Of some clips: what `Losing` takes."""
    disturbed = disturb(chunk_latents(chunk), noise)
    return *disturbed, *dropped(_prompts(chunk), nothing, noise).tensors()


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
    n, device = len(latents), latents.device
    u = (torch.arange(n, device=device) + torch.rand(n, generator=noise, device=device)) / n
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


def picked(chunk: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {key: value[index] for key, value in chunk.items()}


def on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in tensors.items()}
