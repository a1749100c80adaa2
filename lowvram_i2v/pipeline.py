"""The story of the project: a picture and a prompt become a video, phase by phase.

Each phase loads one component, uses it and frees it; between phases only small tensors stay, on the CPU. Read
`generate`; each phase is the function of the same order below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowvram_i2v.device import compute_dtype, describe, phase
from lowvram_i2v.dit.conditioning import StepConditioning, is_conditioning
from lowvram_i2v.dit.rope import rope_table, token_grid
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.events import Listener, PhaseAdvanced
from lowvram_i2v.image import pixels
from lowvram_i2v.job import Job, prepare
from lowvram_i2v.profile import VramProfile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.sampling.conditioning import condition, draw_noise, start_latents
from lowvram_i2v.sampling.denoise import GuidedVelocity, denoise
from lowvram_i2v.sampling.schedule import flow_sigmas, timesteps_of
from lowvram_i2v.streaming.load import stream_blocks
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.embeds import PromptEmbeds
from lowvram_i2v.text.encode import black_image, pooled_vector, prompt_rows
from lowvram_i2v.text.llava import build_llava, llava_tensor_name
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.tiles import Tiling, decode_segments
from lowvram_i2v.video import to_uint8, write_video


def generate(
    request: GenerateRequest, folder: Path, profile: VramProfile, device: torch.device, listen: Listener
) -> Path:
    """Makes the video that the request asks for, with the model in `folder`, and returns its path.

    Raises one of the four errors of `lowvram_i2v.errors`, all but running out of memory before a weight is read.
    """
    job = prepare(request, folder, profile, device, listen)
    prompts = encode_prompts(job)
    image_latent = encode_image(job)
    steps = condition_steps(job, prompts)
    latents = sample(job, steps, image_latent, draw_noise(job.latent_shape, job.request.seed))
    return write(job, decode(job, latents))


Prompts = tuple[PromptEmbeds, PromptEmbeds | None]
Steps = tuple[list[StepConditioning], list[StepConditioning] | None]


def encode_prompts(job: Job) -> Prompts:
    """The prompt with the picture, and the negative prompt with a black one if there is one. On the CPU."""
    header, device = job.model.header, job.device
    pairs = [(job.prompt, job.picture)]
    if job.negative_prompt is not None:
        pairs.append((job.negative_prompt, black_image(job.picture)))
    dtype, stride = compute_dtype(device, torch.float16), header.variant.image_row_stride

    with (
        phase("text", device, job.listen),
        job.model.load(
            "text_encoder",
            lambda: build_llava(header.text_encoder),
            device=device,
            dtype=dtype,
            file_name=llava_tensor_name,
        ) as llava,
    ):
        tokenizer = LlavaTokenizer(job.model.tokenizer)
        rows = [prompt_rows(llava, tokenizer, prompt, picture, stride).float().cpu() for prompt, picture in pairs]

    with (
        phase("pooled text", device, job.listen),
        job.model.load(
            "text_encoder_2",
            lambda: build_clip(header.text_encoder_2),
            device=device,
            dtype=dtype,
            file_name=clip_tensor_name,
        ) as clip,
    ):
        clip_tokenizer = ClipTokenizer(job.model.tokenizer_2)
        pooled = [pooled_vector(clip, clip_tokenizer, prompt).float().cpu() for prompt, _ in pairs]

    embeds = [PromptEmbeds(row, vector) for row, vector in zip(rows, pooled, strict=True)]
    return embeds[0], embeds[1] if len(embeds) > 1 else None


@torch.inference_mode()
def encode_image(job: Job) -> Tensor:
    """The first frame as a latent [16, 1, H, W], times the scaling factor: the distribution's mode, never tiled."""
    vae, device = job.model.header.vae, job.device
    dtype = compute_dtype(device, torch.float16)
    with (
        phase("image", device, job.listen),
        job.model.load("vae", lambda: VaeEncoder(vae), device=device, dtype=dtype) as encoder,
    ):
        frame = torch.from_numpy(pixels(job.first_frame))[:, None].to(device)
        mean, _ = encoder.encode(frame)
        return mean.cpu() * vae.scaling_factor


@torch.inference_mode()
def condition_steps(job: Job, prompts: Prompts) -> Steps:
    """What time and prompt decide in every step, for the prompt and the negative prompt. On the CPU."""
    request, device, config = job.request, job.device, job.model.header.transformer
    timesteps = timesteps_of(flow_sigmas(request.steps, job.flow_shift)).to(device)
    guidance = None if job.guidance_scale is None else torch.tensor([job.guidance_scale], device=device)
    with (
        phase("conditioning", device, job.listen),
        job.model.load(
            "transformer",
            lambda: HunyuanVideoTransformer(config, job.attend),
            device=device,
            dtype=compute_dtype(device, torch.bfloat16),
            only=is_conditioning,
        ) as transformer,
    ):
        positive, negative = (_condition(transformer, timesteps, embeds, guidance) for embeds in prompts)
    assert positive is not None
    return positive, negative


def _condition(
    transformer: HunyuanVideoTransformer, timesteps: Tensor, embeds: PromptEmbeds | None, guidance: Tensor | None
) -> list[StepConditioning] | None:
    if embeds is None:
        return None
    prompt, pooled = (x.to(timesteps.device) for x in (embeds.prompt_embeds, embeds.pooled_prompt_embeds))
    steps = transformer.condition(timesteps, prompt, pooled, guidance)
    return [step.on_host(pin=timesteps.is_cuda) for step in steps]


@torch.inference_mode()
def sample(job: Job, steps: Steps, image_latent: Tensor, noise: Tensor) -> Tensor:
    """Noise [16, T, H, W] -> latents of the same shape, float32, on the CPU."""
    request, header, device = job.request, job.model.header, job.device
    config, (width, height) = header.transformer, job.size
    dtype = compute_dtype(device, torch.bfloat16)
    cos, sin = rope_table(
        token_grid(request.frames, height, width), config.rope_dims, config.rope_theta, request.frames
    )
    with (
        phase("denoise", device, job.listen, request.steps, "steps"),
        job.model.load(
            "transformer",
            lambda: HunyuanVideoTransformer(config, job.attend),
            device=device,
            dtype=dtype,
            only=lambda name: not is_conditioning(name) and not is_in_block(name),
        ) as transformer,
        stream_blocks(
            job.model.files["transformer"],
            transformer.blocks(),
            device=device,
            dtype=dtype,
            resident=job.profile.resident_blocks,
            slots=job.profile.slots,
            only=lambda name: not is_conditioning(name),
        ) as blocks,
    ):
        velocity = GuidedVelocity(transformer, *steps, request.cfg, (cos.to(device), sin.to(device)), blocks)
        return denoise(
            velocity,
            condition(header.variant, image_latent.to(device)),
            start_latents(noise, image_latent, request.stability).to(device),
            flow_sigmas(request.steps, job.flow_shift),
            lambda step, _: job.listen(PhaseAdvanced("denoise", step)),
        ).cpu()


def decode(job: Job, latents: Tensor) -> Iterator[Tensor]:
    """Latents [16, T, H, W] -> pieces of the video [3, frames, height, width] in 0..1, on the CPU, when ready."""
    header, device = job.model.header, job.device
    drop = header.variant.dropped_frames
    with (
        phase("decode", device, job.listen, job.output_frames, "frames"),
        job.model.load(
            "vae", lambda: VaeDecoder(header.vae), device=device, dtype=compute_dtype(device, torch.float16)
        ) as decoder,
    ):
        done = -drop
        for segment in _segments(job, decoder, latents.to(device) / header.vae.scaling_factor):
            frames = (segment / 2 + 0.5).clamp(0, 1).cpu()
            yield frames[:, max(0, -done) :]
            done += frames.shape[1]
            job.listen(PhaseAdvanced("decode", max(0, done)))


def _segments(job: Job, decoder: VaeDecoder, latents: Tensor) -> Iterator[Tensor]:
    """What the profile's decode policy makes of it: one piece, or the reference's tiles in time."""
    with torch.inference_mode():
        if job.profile.decode == "plain":
            yield decoder.decode(latents)
        else:
            yield from decode_segments(decoder, latents, Tiling.from_config(job.model.header.vae))


def write(job: Job, pieces: Iterator[Tensor]) -> Path:
    """Frames into the mp4 as they come, settings and circumstances with them."""
    about = {
        "model": str(job.model.path.absolute()),
        "variant": job.model.header.variant.name,
        "scheme": job.model.header.scheme,
        "profile": job.profile.name,
        "device": describe(job.device),
    }
    frames = (frame for piece in pieces for frame in to_uint8(np.ascontiguousarray(piece.permute(1, 2, 3, 0).numpy())))
    write_video(frames, job.request.output, job.request.fps, job.request.to_settings(**about))
    return job.request.output
