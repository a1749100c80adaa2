"""The story of the project: a picture and a prompt become a video, phase by phase.

Each phase loads one component, uses it and frees it; between phases only small tensors stay, on the CPU. Read
`generate`; each phase is the function of the same order below it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram_i2v.attention import by_layout
from lowvram_i2v.device import compute_dtype, describe, limited, phase, release
from lowvram_i2v.dit import chunked
from lowvram_i2v.dit.conditioning import StepConditioning, is_conditioning, is_embedder, is_modulation
from lowvram_i2v.dit.rope import rope_table, token_grid
from lowvram_i2v.dit.token_order import token_order
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.dit.workspace import Workspace
from lowvram_i2v.embed_cache import latent_key, prompt_key
from lowvram_i2v.errors import PlatformError, ResourceError
from lowvram_i2v.events import Listener, Notice, PhaseAdvanced
from lowvram_i2v.image import pixels
from lowvram_i2v.job import DEFAULTS, Job, RunOptions, VideoJob, prepare, prepare_decode
from lowvram_i2v.kernels import decoder_trial
from lowvram_i2v.kernels.op_cases import Sizes, faults
from lowvram_i2v.kernels.ops import PLAIN, Ops, choose
from lowvram_i2v.kernels.quant_linear import set_compute
from lowvram_i2v.kernels.w8a8 import CODES
from lowvram_i2v.latents_file import LatentsFile, latents_path, save_latents
from lowvram_i2v.preview import PreviewWriter, preview_path
from lowvram_i2v.profile import VramProfile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.sampling.conditioning import condition, draw_noise, start_latents
from lowvram_i2v.sampling.denoise import GuidedVelocity, denoise
from lowvram_i2v.sampling.schedule import flow_sigmas, timesteps_of
from lowvram_i2v.streaming.block_stream import FEWEST_SLOTS
from lowvram_i2v.streaming.load import stream_blocks
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.embeds import PromptEmbeds
from lowvram_i2v.text.encode import black_image, pooled_vector, prompt_rows
from lowvram_i2v.text.llava import build_llava, llava_tensor_name
from lowvram_i2v.text.streamed import is_loaded, streamed_llava
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.engine import decode_frames
from lowvram_i2v.vae.image_encoder import ImageEncoder
from lowvram_i2v.vae.policy import policy_of
from lowvram_i2v.video import write_video

if TYPE_CHECKING:
    from PIL.Image import Image

SELF_TEST_ROWS = 70
"""Tokens on which fused kernels are tried: more than one program's, and not a multiple of anything."""


def generate(
    request: GenerateRequest,
    folder: Path,
    profile: VramProfile,
    device: torch.device,
    listen: Listener,
    options: RunOptions = DEFAULTS,
) -> Path:
    """Makes the video that the request asks for, with the model in `folder`, and returns its path.

    Raises one of the four errors of `lowvram_i2v.errors`, all but running out of memory before a weight is read.
    """
    job = prepare(request, folder, profile, device, listen, options)
    with limited(device, job.plan.limit):
        prompts = encode_prompts(job)
        image_latent = encode_image(job)
        steps = condition_steps(job, prompts)
        latents = sample(job, steps, image_latent, draw_noise(job.latent_shape, job.request.seed))
        with saved(job, latents):
            return write(job, decode(job, latents), _settings(job))


def decode_file(
    latents: LatentsFile, folder: Path, profile: VramProfile, device: torch.device, output: Path, listen: Listener
) -> Path:
    """The last two phases of `generate`, on latents that a run left. The file of latents is kept."""
    job = prepare_decode(latents, folder, profile, device, output, listen)
    with limited(device, job.plan.limit):
        return write(job, decode(job, latents.read()), _decoded_settings(job, latents))


Prompts = tuple[PromptEmbeds, PromptEmbeds | None]
Steps = tuple[list[StepConditioning], list[StepConditioning] | None]


def encode_prompts(job: Job) -> Prompts:
    """The prompt with the picture, and the negative prompt with a black one if there is one. On the CPU.

    What the cache has is not encoded again; if it has all, no encoder is loaded.
    """
    pairs = [(job.prompt, job.picture)]
    if job.negative_prompt is not None:
        pairs.append((job.negative_prompt, black_image(job.picture)))
    dtype = compute_dtype(job.device, torch.float16)
    keys = [prompt_key(job.model, *pair, dtype) for pair in pairs]
    embeds = [job.cache.prompt_embeds(key) for key in keys]
    missing = [place for place, found in enumerate(embeds) if found is None]
    if missing:
        new = _encode([pairs[place] for place in missing], job, dtype)
        for place, made in zip(missing, new, strict=True):
            job.cache.keep_prompt_embeds(keys[place], made)
            embeds[place] = made
    else:
        job.listen(Notice("text: encoded before, taken from the cache"))
    positive, negative = (*embeds, None)[:2]
    assert positive is not None
    return positive, negative


def _encode(pairs: list[tuple[str, Image]], job: Job, dtype: torch.dtype) -> list[PromptEmbeds]:
    """Prompts with their pictures through both encoders, one encoder after the other."""
    header, device, model = job.model.header, job.device, job.model
    with (
        phase("text", device, job.listen),
        model.load(
            "text_encoder",
            lambda: build_llava(header.text_encoder),
            device=device,
            dtype=dtype,
            file_name=llava_tensor_name,
            only=is_loaded,
        ) as llava,
        streamed_llava(model.files["text_encoder"], llava, device=device, dtype=dtype),
    ):
        tokenizer, stride = LlavaTokenizer(model.tokenizer), header.variant.image_row_stride
        rows = [prompt_rows(llava, tokenizer, prompt, picture, stride).float().cpu() for prompt, picture in pairs]

    with (
        phase("pooled text", device, job.listen),
        model.load(
            "text_encoder_2",
            lambda: build_clip(header.text_encoder_2),
            device=device,
            dtype=dtype,
            file_name=clip_tensor_name,
        ) as clip,
    ):
        clip_tokenizer = ClipTokenizer(model.tokenizer_2)
        pooled = [pooled_vector(clip, clip_tokenizer, prompt).float().cpu() for prompt, _ in pairs]
    return [PromptEmbeds(row, vector) for row, vector in zip(rows, pooled, strict=True)]


@torch.inference_mode()
def encode_image(job: Job) -> Tensor:
    """The first frame as a latent [16, 1, H, W], times the scaling factor: the distribution's mode, never tiled."""
    vae, device = job.model.header.vae, job.device
    dtype = compute_dtype(device, torch.float16)
    key = latent_key(job.model, job.first_frame, dtype)
    if (kept := job.cache.latent(key)) is not None:
        job.listen(Notice("image: encoded before, taken from the cache"))
        return kept
    with (
        phase("image", device, job.listen),
        job.model.load("vae", lambda: VaeEncoder(vae), device=device, dtype=dtype) as encoder,
    ):
        frame = torch.from_numpy(pixels(job.first_frame))[:, None].to(device)
        mean, _ = ImageEncoder(encoder).encode(frame)
        latent = mean.cpu() * vae.scaling_factor
    job.cache.keep_latent(key, latent)
    return latent


@torch.inference_mode()
def condition_steps(job: Job, prompts: Prompts) -> Steps:
    """What time and prompt decide in every step, for the prompt and the negative prompt. On the CPU."""
    request, device, config = job.request, job.device, job.model.header.transformer
    dtype = compute_dtype(device, torch.bfloat16)
    timesteps = timesteps_of(flow_sigmas(request.steps, job.flow_shift)).to(device)
    guidance = None if job.guidance_scale is None else torch.tensor([job.guidance_scale], device=device)
    with (
        phase("conditioning", device, job.listen),
        job.model.load(
            "transformer",
            lambda: HunyuanVideoTransformer(config, job.attend),
            device=device,
            dtype=dtype,
            only=is_embedder,
        ) as transformer,
        stream_blocks(
            job.model.files["transformer"],
            transformer.blocks(),
            device=device,
            dtype=dtype,
            resident=0,
            slots=FEWEST_SLOTS,
            host="mapped",
            only=is_modulation,
        ) as blocks,
    ):
        positive, negative = (_condition(transformer, timesteps, embeds, guidance, blocks) for embeds in prompts)
    assert positive is not None
    return positive, negative


def _condition(
    transformer: HunyuanVideoTransformer,
    timesteps: Tensor,
    embeds: PromptEmbeds | None,
    guidance: Tensor | None,
    blocks: Iterable[nn.Module],
) -> list[StepConditioning] | None:
    if embeds is None:
        return None
    prompt, pooled = (x.to(timesteps.device) for x in (embeds.prompt_embeds, embeds.pooled_prompt_embeds))
    steps = transformer.condition(timesteps, prompt, pooled, guidance, blocks)
    return [step.on_host(pin=timesteps.is_cuda) for step in steps]


@torch.inference_mode()
def sample(job: Job, steps: Steps, image_latent: Tensor, noise: Tensor) -> Tensor:
    """Noise [16, T, H, W] -> latents of the same shape, float32, on the CPU."""
    request, header, device, plan, profile = job.request, job.model.header, job.device, job.plan, job.profile
    config, (width, height) = header.transformer, job.size
    dtype = compute_dtype(device, torch.bfloat16)
    grid = token_grid(request.frames, height, width)
    cos, sin = rope_table(grid, config.rope_dims, config.rope_theta, request.frames)
    attention = by_layout(profile.attention, profile.sparse_density, profile.sparse_after)
    order = None if attention is None else token_order(grid, config.patch_size)
    if order is not None:
        (cos, sin), order = order.rope((cos, sin)), order.to(device)
    text_tokens = max(len(prompt[0].txt) for prompt in steps if prompt is not None)
    ops = _trusted_ops(job, dtype)  # while the card is empty
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
            resident=plan.resident,
            slots=plan.slots,
            host=plan.host,
            only=lambda name: not is_conditioning(name),
        ) as blocks,
    ):
        set_compute(transformer, profile.compute)
        work = Workspace(config, len(cos), text_tokens, plan.chunking, device, dtype, ops)
        rope = cos.to(device), sin.to(device)
        velocity = GuidedVelocity(transformer, *steps, request.cfg, rope, blocks, work, attention, order)
        sigmas = flow_sigmas(request.steps, job.flow_shift)
        latents = denoise(
            velocity,
            condition(header.variant, image_latent.to(device)),
            start_latents(noise, image_latent, request.stability).to(device),
            sigmas,
            _watch(job, sigmas),
        ).cpu()
        _check_numbers(job, request.steps, latents)
        return latents


def _check_numbers(job: Job, step: int, latents: Tensor) -> None:
    """Raises PlatformError where the latents hold what is no number. Waits for the device."""
    if not bool(latents.isfinite().all()):
        profile = job.profile
        raise PlatformError(
            f"after step {step} the latents hold values that are not numbers (profile {profile.name}: compute "
            f"{profile.compute}, attention {profile.attention}; {job.model.header.scheme} weights)",
            "`lowvram-i2v verify` looks for damaged weights, `lowvram-i2v check-kernels` for kernels that are wrong on "
            'this card; a profile with compute = "w8a16" and attention = "sdpa" uses none of ours in 8 bits.',
        )


def _trusted_ops(job: Job, dtype: torch.dtype) -> Ops:
    """The ops of this device: fused kernels where they pass their self-test on it, else torch's own, which are then
    tried too. Raises PlatformError where those fail."""
    header, ops = job.model.header, choose(job.device)
    if ops is PLAIN:
        return ops
    config = header.transformer
    sizes = Sizes(SELF_TEST_ROWS, SELF_TEST_ROWS // 3, config.heads, config.head_dim, config.mlp_hidden)
    codes = [CODES[header.scheme]] if job.profile.compute == "w8a8" and header.scheme in CODES else []
    refused = faults(ops, sizes, job.device, dtype, chunked.OPS, codes)
    trusted = choose(job.device, refused)
    still = faults(trusted, sizes, job.device, dtype, refused, codes)
    release(job.device)
    for name, why in refused.items():
        job.listen(Notice(f"The fused kernel {name} fails its self-test on this card; torch's own is used ({why})."))
    if still:
        raise PlatformError(
            f"torch's own {', '.join(still)} fails its self-test on this card too: {'; '.join(still.values())}",
            'A profile with compute = "w8a16" needs no 8-bit products; --device cpu needs no card.',
        )
    return trusted


def _watch(job: Job, sigmas: Tensor) -> Callable[[int, Tensor], None]:
    """What happens after each step: progress is told, and previews are written where they are wanted. After the first
    one a run that makes no numbers ends."""
    preview: Callable[[int, Tensor], None] = lambda *_: None  # noqa: E731
    if job.preview_every:
        path, fps = preview_path(job.request.output), job.request.fps
        dtype = compute_dtype(job.device, torch.float16)
        preview = PreviewWriter(path, sigmas.tolist(), job.preview_every, fps, job.listen, job.preview_decoder, dtype)

    def watch(step: int, latents: Tensor) -> None:
        job.listen(PhaseAdvanced("denoise", step))
        if step == 1:
            _check_numbers(job, step, latents)
        preview(step, latents)

    return watch


@contextmanager
def saved(job: Job, latents: Tensor) -> Iterator[None]:
    """Keeps the finished latents beside the output until the video is complete: nothing finished is lost."""
    path, kept = latents_path(job.request.output), None
    try:
        save_latents(path, latents, _settings(job))
        kept = path.stat().st_ino
    except ResourceError as error:
        job.listen(Notice(f"The latents are not kept while they are decoded: {error.what}"))
    try:
        yield
    except BaseException:
        if kept is not None:
            job.listen(Notice(f"The sampled latents are safe. To go on: lowvram-i2v decode {path}"))
        raise
    with suppress(FileNotFoundError):
        if path.stat().st_ino == kept:  # not that of another run with this output
            path.unlink()


def decode(job: VideoJob, latents: Tensor) -> Generator[Tensor]:
    """Latents [16, T, H, W] -> pieces of the video [3, frames, height, width] in 0..1, on the CPU, when ready."""
    header, device = job.model.header, job.device
    drop = header.variant.dropped_frames
    if device.type == "cuda" and (why := decoder_trial.fault(device)):
        job.listen(
            Notice(f"The decoder's own kernels are not used on this card; torch's are, which are slower ({why}).")
        )
    with (
        phase("decode", device, job.listen, job.output_frames, "frames"),
        job.model.load(
            "vae", lambda: VaeDecoder(header.vae), device=device, dtype=compute_dtype(device, torch.float16)
        ) as decoder,
    ):
        done = -drop
        latents, policy = latents / header.vae.scaling_factor, policy_of(job.profile.decode)
        for frames in decode_frames(decoder, latents, policy, job.plan.decoding):
            with torch.inference_mode():
                frames.mul_(0.5).add_(0.5).clamp_(0, 1)
            yield frames[:, max(0, -done) :]
            done += frames.shape[1]
            job.listen(PhaseAdvanced("decode", max(0, done)))


def write(job: VideoJob, pieces: Generator[Tensor], settings: dict[str, Any]) -> Path:
    """Frames into the mp4 as they come, settings and circumstances with them. Ends `pieces` whatever happens."""
    with closing(pieces):
        frames = (frame for piece in pieces for frame in piece.permute(1, 2, 3, 0).numpy())
        write_video(frames, job.request.output, job.request.fps, settings)
    return job.request.output


def _settings(job: VideoJob) -> dict[str, Any]:
    """All that repeats the run, and under `about` how it was computed: the profile's way, or what replaced it here."""
    profile = job.profile
    sparse = {"sparse_density": profile.sparse_density, "sparse_after": profile.sparse_after}
    return job.request.to_settings(
        model=str(job.model.path.absolute()),
        variant=job.model.header.variant.name,
        scheme=job.model.header.scheme,
        profile=profile.name,
        device=describe(job.device),
        compute=profile.compute,
        attention=profile.attention,
        **(sparse if profile.attention == "triton-sparse" else {}),
        decode=profile.decode,
    )


def _decoded_settings(job: VideoJob, latents: LatentsFile) -> dict[str, Any]:
    """Those of the run that made the latents; only the decoding is this run's."""
    settings = _settings(job)
    made = latents.settings.get("about")
    if isinstance(made, dict):
        settings["about"] |= made | {"decode": job.profile.decode}
    return settings
