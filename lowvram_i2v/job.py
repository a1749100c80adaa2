"""From a request to a job: everything that can be refused is refused here, before a weight is read.

Invariant: `prepare` reads headers, the picture and the tokenizers, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lowvram_i2v import attention
from lowvram_i2v.attention import choice
from lowvram_i2v.checkpoint import ModelFolder, open_model
from lowvram_i2v.device import free_vram, multiplies_float8
from lowvram_i2v.embed_cache import EmbedCache
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, Notice, Planned
from lowvram_i2v.host_memory import available_ram
from lowvram_i2v.image import fit_image, read_image
from lowvram_i2v.kernels.compute import refusal
from lowvram_i2v.latents_file import LatentsFile, latents_path
from lowvram_i2v.plan import DecodePlan, Machine, MemoryPlan, Video, make_plan, plan_decode
from lowvram_i2v.profile import VramProfile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.sizes import sizes_of
from lowvram_i2v.video import check_output

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from lowvram_i2v.attention import AttentionBackend
    from lowvram_i2v.vae.preview import TinyDecoder

DEFAULT_GUIDANCE = 6.0

P = TypeVar("P", bound=DecodePlan)


@dataclass(frozen=True)
class RunOptions:
    """What changes nothing about the video. cache: of encoded prompts and first frames, None for none.
    preview_every: steps between previews, 0 for none; preview_vae: TAEHV's file, for better ones."""

    cache: EmbedCache | None = None
    preview_every: int = 0
    preview_vae: Path | None = None


DEFAULTS = RunOptions()


@dataclass(frozen=True)
class VideoJob:
    """What decoding and writing need. request: with size and flow shift filled in."""

    request: GenerateRequest
    model: ModelFolder
    profile: VramProfile
    device: torch.device
    plan: DecodePlan
    listen: Listener

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the video in pixels."""
        assert self.request.size is not None
        return self.request.size

    @property
    def flow_shift(self) -> float:
        assert self.request.flow_shift is not None
        return self.request.flow_shift

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[channels, T, H, W] of the latents."""
        width, height = self.size
        vae = self.model.header.vae
        time = (self.request.frames - 1) // vae.time_ratio + 1
        return vae.latent_channels, time, height // vae.spatial_ratio, width // vae.spatial_ratio

    @property
    def output_frames(self) -> int:
        """Frames of the mp4: latent_concat throws its first four decoded frames away."""
        return self.request.frames - self.model.header.variant.dropped_frames


@dataclass(frozen=True)
class Job(VideoJob):
    """A request that can be carried out.

    attend: attention of the profile's backend. picture: the whole image, which the text model looks at. first_frame:
    the same, scaled and cropped to the video's size. guidance_scale: None for weights without its embedder.
    negative_prompt: None without classifier-free guidance. cache, preview_every: as in RunOptions.
    preview_decoder: on the CPU; None for previews by a matrix.
    """

    plan: MemoryPlan
    attend: AttentionBackend
    picture: Image
    first_frame: Image
    prompt: str
    negative_prompt: str | None
    guidance_scale: float | None
    cache: EmbedCache
    preview_every: int
    preview_decoder: TinyDecoder | None


def prepare(
    request: GenerateRequest,
    folder: Path,
    profile: VramProfile,
    device: torch.device,
    listen: Listener,
    options: RunOptions = DEFAULTS,
) -> Job:
    """Checks request, picture, output, model folder, prompts and memory. Raises one of the four errors, or returns the
    job."""
    request.check()
    model = open_model(folder)
    picture = read_image(request.image, listen)
    request = request.resolve(*picture.size)
    assert request.size is not None
    fitted = fit_image(picture, *request.size)
    check_output(request.output, *request.size, request.frames - model.header.variant.dropped_frames)
    _check_tensors(model)
    sizes = sizes_of(model)
    profile = _computable(profile, sizes.scheme, device, listen)
    profile = _attending(profile, sizes.transformer.head_dim, device, listen)
    job = Job(
        request=request,
        model=model,
        profile=profile,
        device=device,
        plan=_plan(partial(make_plan, sizes), request, profile, device, listen),
        attend=attention.get(profile.attention),
        picture=picture,
        first_frame=fitted.image,
        prompt=request.prompt.strip(),
        negative_prompt=_negative_prompt(request),
        guidance_scale=_guidance_scale(request, model),
        cache=options.cache or EmbedCache(None),
        preview_every=options.preview_every,
        preview_decoder=_preview_decoder(options),
        listen=listen,
    )
    _check_prompts(job)
    for text in (fitted.description, *request.notices()):
        listen(Notice(text))
    _say_replaced(job)
    if (older := latents_path(request.output)).exists():
        listen(Notice(f"{older}, which an earlier run left, will be replaced: decode it first if you want its video."))
    _say_dropped(job)
    return job


def prepare_decode(
    latents: LatentsFile, folder: Path, profile: VramProfile, device: torch.device, output: Path, listen: Listener
) -> VideoJob:
    """The same for latents that are finished: checks them, the VAE of the model folder, the output and the memory."""
    request, model = latents.request(output), open_model(folder, ("vae",))
    assert request.size is not None
    channels = model.header.vae.latent_channels
    if latents.variant != model.header.variant or latents.shape[0] != channels:
        raise RequestError(
            f"{latents.path} holds {latents.shape[0]} channels of {latents.variant.name} weights, and {folder} has "
            f"{channels} of {model.header.variant.name}",
            "Name the model folder that the latents were made with.",
        )
    plan = _plan(partial(plan_decode, model.header.vae), request, profile, device, listen)
    job = VideoJob(request, model, profile, device, plan, listen)
    check_output(request.output, *request.size, job.output_frames)
    _check_tensors(model)
    _say_replaced(job)
    _say_dropped(job)
    return job


def _preview_decoder(options: RunOptions) -> TinyDecoder | None:
    """TAEHV from its file, if one is named, so that a wrong file is refused now."""
    import torch

    from lowvram_i2v.preview import load_tiny_decoder

    if options.preview_vae is None:
        return None
    return load_tiny_decoder(options.preview_vae, torch.device("cpu"), torch.float32)


def _computable(profile: VramProfile, scheme: str | None, device: torch.device, listen: Listener) -> VramProfile:
    """The profile, with exact products where this card cannot make 8-bit ones. Tries a small product."""
    reason = refusal(profile.compute, scheme, device)
    if reason is None:
        return profile
    listen(Notice(f"compute {profile.compute}: {reason}. Weights are dequantized instead (w8a16)."))
    return replace(profile, compute="w8a16")


def _attending(profile: VramProfile, head_dim: int, device: torch.device, listen: Listener) -> VramProfile:
    """The profile, with the attention backend that runs on this card. Tries the one asked for on a few tokens."""
    if reason := choice.too_old(device):
        listen(Notice(f"{reason}: torch's own writes all scores to memory, which suits small, short videos only."))
    chosen = choice.choose(profile.attention, device, head_dim, eight_bit=profile.compute == "w8a8")
    if chosen.name != profile.attention:
        listen(Notice(f"attention: {chosen.name} ({chosen.why})"))
    return replace(profile, attention=chosen.name)


def _plan(
    make: Callable[[Video, VramProfile, Machine], P],
    request: GenerateRequest,
    profile: VramProfile,
    device: torch.device,
    listen: Listener,
) -> P:
    """The plan that `make` has for what is free now. On the CPU no video memory is planned and nothing has to fit."""
    assert request.size is not None
    on_gpu = device.type == "cuda"
    if not on_gpu:
        profile = replace(profile, vram_gib=0.0)
    old = choice.too_old(device) is not None
    machine = Machine(free_vram(device), available_ram() if on_gpu else None, multiplies_float8(device), scores=old)
    video = Video(*request.size, request.frames, request.steps, request.cfg > 1)
    plan = make(video, profile, machine)
    if on_gpu:
        listen(Planned(plan.table(), {phase.name: phase.vram for phase in plan.phases}, plan.limit))
    return plan


def _say_replaced(job: VideoJob) -> None:
    if job.request.output.exists():
        job.listen(Notice(f"{job.request.output} is there already; the new video replaces it when it is complete."))


def _say_dropped(job: VideoJob) -> None:
    """That a variant's first frames are no part of the video."""
    asked, kept = job.request.frames, job.output_frames
    if kept != asked:
        job.listen(
            Notice(
                f"{job.model.header.variant.name} weights: the first {asked - kept} of {asked} frames are dropped, as "
                f"trained; the video has {kept}."
            )
        )


def _negative_prompt(request: GenerateRequest) -> str | None:
    """None at CFG 1, where it would not be used; an empty one means the default one, as in the reference."""
    from lowvram_i2v.text.template import DEFAULT_NEGATIVE_PROMPT

    return (request.negative_prompt.strip() or DEFAULT_NEGATIVE_PROMPT) if request.cfg > 1 else None


def _guidance_scale(request: GenerateRequest, model: ModelFolder) -> float | None:
    embedded = model.header.transformer.guidance_embed
    if request.guidance is not None and not embedded:
        raise RequestError(
            f"--guidance {request.guidance:g}: these {model.header.variant.name} weights have no guidance embedder",
            "Leave it out; --cfg 6 guides such weights at twice the time a step.",
        )
    if not embedded:
        return None
    return DEFAULT_GUIDANCE if request.guidance is None else request.guidance


def _check_tensors(model: ModelFolder) -> None:
    """The opened components' tensor names and shapes against what their modules would load."""
    from torch.nn import Module

    from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
    from lowvram_i2v.text.clip import build_clip, clip_tensor_name
    from lowvram_i2v.text.llava import build_llava, llava_tensor_name
    from lowvram_i2v.vae.decoder import VaeDecoder
    from lowvram_i2v.vae.encoder import VaeEncoder

    header = model.header

    def same(name: str) -> str:
        return name

    modules: tuple[tuple[str, Callable[[], Module], Callable[[str], str]], ...] = (
        ("transformer", lambda: HunyuanVideoTransformer(header.transformer), same),
        ("text_encoder", lambda: build_llava(header.text_encoder), llava_tensor_name),
        ("text_encoder_2", lambda: build_clip(header.text_encoder_2), clip_tensor_name),
        ("vae", lambda: VaeEncoder(header.vae), same),
        ("vae", lambda: VaeDecoder(header.vae), same),
    )
    expected: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, build, file_name in modules:
        if component not in model.files:
            continue
        state = model.build(component, build, file_name).state_dict()
        expected.setdefault(component, {}).update({file_name(key): tuple(value.shape) for key, value in state.items()})
    # layers of the text encoder that are stored but never run are no fault
    model.check(expected, extra_ok=lambda component, name: component == "text_encoder")


def _check_prompts(job: Job) -> None:
    """Opens the tokenizers, so that damaged ones are refused now, and says what of a prompt will not be seen."""
    from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer

    llava, clip = LlavaTokenizer(job.model.tokenizer), ClipTokenizer(job.model.tokenizer_2)
    for name, prompt in (("prompt", job.prompt), ("negative prompt", job.negative_prompt or "")):
        if cut := llava.encode(prompt).cut:
            job.listen(Notice(f"{name}: {cut}"))
        clip.encode(prompt)  # its window of 77 is a summary by design: not worth a notice
