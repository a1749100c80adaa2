"""Stage 1, the video VAE: absolute and squared error, sharpness of edges, a little KL.

The loss has no perceptual network and no adversary: nothing is downloaded, and the drawn world has few textures to
hallucinate. `sharpness` compares neighbour differences, which a blurred edge misses by much and a mean error by little.
Strong colours count more: they are the objects', which are small, and a model that has seen little paints them wrong.

At first the clips are short pieces of pictures, many at a time; the last steps see them as they are.

Group norm makes a picture's latent differ from the first latent of its video, and the sampler puts the picture's there.
So half of the steps decode the picture's latent followed by the video's others: the decoder learns both.

Result: the moving average, `vae.json`, the config with the measured scaling factor (1 / standard deviation), and
`vae.png`, held-out frames over what became of them. Stage 4 (`decoder.py`) goes on with the decoder alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from tools.train_demo import batched_vae
from tools.train_demo.batched_vae import Way
from tools.train_demo.clips import Clips, Window
from tools.train_demo.loop import Losses, Run, Training, averaged, generators, is_trained
from tools.train_demo.sheet import write_sheet
from tools.train_demo.sizes import Recipe, Stage

SHARPNESS, SQUARED, KL = 0.2, 3.0, 1e-4
COLOURED = 2.0  # how much more a pixel of full colour counts than a grey one
PIECES = 0.6  # of the stage: its steps see pieces
PIECE = 96  # rows and columns of a piece
SHORTEST, SHORT = 5, 17  # frames
MEASURED = 16  # clips of the scaling factor
EXAMINED, SHOWN = 8, 2  # held-out clips of each size: judged, on the sheet
AT_ONCE = 8  # clips of a pass without gradients


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
    """Trains until the time is up, then measures the scaling factor and draws the sheet."""
    stage = recipe.vae
    torch.manual_seed(run.seed)
    clips.ahead(0)
    training = Training("vae", Vae(recipe.size.vae), stage, run)
    model = training.model
    assert isinstance(model, Vae)
    if not training.over:
        window = Window(clips, lambda number: frames_of(clips, number, run), stage.chunk_steps, stage.most_chunks)
        held_out = examined(recipe, clips, run)

        def losses_with(videos: Tensor, noise: torch.Generator, way: Way) -> Losses:
            return step_losses(model, videos, torch.Generator().manual_seed(0), noise, way)

        def losses_of(step: int) -> Losses:
            choices, noise = generators(run, step)
            frames = window.draw(step, choices)["frames"]
            return step_losses(model, batch(frames, stage, training.progress, choices), choices, noise, way)

        way = fastest(training, window, run, losses_with)
        training.run(losses_of, lambda: {"held-out dB": round_trip(model, held_out, way)})
    measure(recipe, clips, run)
    draw(recipe, clips, run)


def step_losses(
    model: Vae, videos: Tensor, choices: torch.Generator, noise: torch.Generator, way: Way
) -> dict[str, Tensor]:
    """videos: uint8 [n, F, H, W, 3]."""
    wanted = as_floats(videos)
    mean, logvar = batched_vae.encode(model, wanted, way)
    latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise, device=mean.device)
    if bool(torch.rand((), generator=choices) < 0.5):
        latents = torch.cat([batched_vae.encode(model, wanted[:, :, :1], way)[0], latents[:, :, 1:]], dim=2)
    made = batched_vae.decode(model, latents, way)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    losses = picture_losses(made, wanted, SQUARED)
    return losses | {"loss": losses["loss"] + KL * kl, "kl": kl}


def picture_losses(made: Tensor, wanted: Tensor, squared_weight: float) -> Losses:
    """Of videos [n, 3, F, H, W] in -1..1."""
    error, weight = made - wanted, 1 + COLOURED * (wanted.amax(1) - wanted.amin(1))[:, None] / 2
    absolute, squared, edges = (weight * error.abs()).mean(), (weight * error.square()).mean(), sharpness(made, wanted)
    decibel = -10 * torch.log10(error.detach().square().mean() / 4)
    total = absolute + squared_weight * squared + SHARPNESS * edges
    return {"loss": total, "l1": absolute, "edges": edges, "dB": decibel}


def sharpness(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours along rows and columns."""
    return sum(F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis)) for axis in (-1, -2))  # type: ignore[return-value]


def as_floats(videos: Tensor) -> Tensor:
    """uint8 [..., F, H, W, 3] -> float [..., 3, F, H, W] in -1..1."""
    return videos.movedim(-1, -4).float() / 127.5 - 1


@torch.no_grad()
def round_trip(model: Vae, held_out: list[Tensor], way: Way) -> float:
    """Mean PSNR of clips, encoded as inference encodes them and decoded. held_out: uint8 [n, F, H, W, 3] each."""
    return sum(float(psnr(made, videos).sum()) for videos, made in _round_trips(model, held_out, way)) / sum(
        len(videos) for videos in held_out
    )


def psnr(made: Tensor, videos: Tensor) -> Tensor:
    """uint8 [n, ...] both -> [n], dB."""
    return -10 * torch.log10(((made.float() - videos.float()) / 255).square().flatten(1).mean(1).clamp(min=1e-10))


def _round_trips(model: Vae, held_out: list[Tensor], way: Way) -> list[tuple[Tensor, Tensor]]:
    """(videos, what became of them), each uint8."""
    made = []
    for videos in held_out:
        for few in torch.split(videos, AT_ONCE):
            latents = batched_vae.picture_latents(model, as_floats(few), way)
            made.append((few, as_bytes(batched_vae.decode(model, latents, way))))
    return made


def as_bytes(videos: Tensor) -> Tensor:
    """The inverse of `as_floats`."""
    return ((videos.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1)


@torch.no_grad()
def measure(recipe: Recipe, clips: Clips, run: Run) -> None:
    """Writes vae.json, in float32."""
    model, way = load(recipe.size.vae, run), Way(torch.float32)
    frames = clips.get(0).frames[:MEASURED].to(run.device)
    latents = torch.cat(
        [batched_vae.picture_latents(model, as_floats(few), way) for few in torch.split(frames, AT_ONCE)]
    )
    config = replace(recipe.size.vae, scaling_factor=round(1 / float(latents.std()), 6))
    (run.work / "vae.json").write_text(json.dumps(config.to_official(), indent=1))
    print(f"vae: scaling factor {config.scaling_factor}", flush=True)


@torch.no_grad()
def draw(recipe: Recipe, clips: Clips, run: Run) -> None:
    """Writes vae.png, in float32."""
    model, way = load(recipe.size.vae, run), Way(torch.float32)
    shown = [chunk.frames.to(run.device) for chunk in clips.held_out(min(SHOWN, recipe.clips_per_chunk))]
    pairs = [pair for videos, made in _round_trips(model, shown, way) for pair in zip(videos, made, strict=True)]
    write_sheet([(video.cpu().numpy(), made.cpu().numpy()) for video, made in pairs], run.work / "vae.png")


def load(config: VaeConfig, run: Run) -> Vae:
    """The trained VAE for use."""
    model = Vae(config)
    model.load_state_dict(trained(run.work))
    return model.to(run.device).eval().requires_grad_(False)


def trained(work: Path) -> dict[str, Tensor]:
    """Stage 1's weights, with the decoder of stage 4 if there is one."""
    return averaged(work, "vae") | (averaged(work, "decoder") if is_trained(work, "decoder") else {})


def trained_config(work: Path) -> VaeConfig:
    """With the measured scaling factor."""
    return VaeConfig.from_official(json.loads((work / "vae.json").read_text()))


def fastest(
    training: Training, window: Window, run: Run, losses_with: Callable[[Tensor, torch.Generator, Way], Losses]
) -> Way:
    """Tried on the training's own steps; leaves no trace in the model."""
    choices, noise = generators(run, training.step)
    videos = window.draw(training.step, choices)["frames"][: training.stage.batch, :SHORT, :PIECE, :PIECE]

    def step(way: Way) -> None:
        torch.autograd.backward(losses_with(videos, noise, way)["loss"])
        training.forget_gradients()

    return batched_vae.fastest(run.device, step)


def examined(recipe: Recipe, clips: Clips, run: Run) -> list[Tensor]:
    """Held-out clips, uint8 [n, F, H, W, 3] of each size."""
    return [chunk.frames.to(run.device) for chunk in clips.held_out(min(EXAMINED, recipe.clips_per_chunk))]


def frames_of(clips: Clips, number: int, run: Run) -> dict[str, Tensor]:
    return {"frames": clips.get(number).frames.to(run.device)}


def batch(frames: Tensor, stage: Stage, progress: float, choices: torch.Generator) -> Tensor:
    """Some clips: at first twice as many shortest or as many short pieces; later short ones, or half as many whole."""
    pieces, first = progress < PIECES, bool(torch.rand((), generator=choices) < (0.5 if progress < PIECES else 0.25))
    count = max(1, int(stage.batch * (2 if pieces else 0.5))) if first else stage.batch
    length = min(frames.shape[1], (SHORTEST if pieces else frames.shape[1]) if first else SHORT)
    sides = [min(side, PIECE) if pieces else side for side in frames.shape[2:4]]
    starts = [_place(whole, part, choices) for whole, part in zip(frames.shape[1:4], (length, *sides), strict=True)]
    chosen = torch.randint(len(frames), (count,), generator=choices).tolist()
    picked = torch.stack([frames[number] for number in chosen])  # without waiting for the GPU
    for axis, (start, part) in enumerate(zip(starts, (length, *sides), strict=True), start=1):
        picked = picked.narrow(axis, start, part)
    return picked


def _place(whole: int, part: int, choices: torch.Generator) -> int:
    return int(torch.randint(whole - part + 1, (), generator=choices))
