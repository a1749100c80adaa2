"""From a request to a job: everything that can be refused is refused here, before a weight is read.

Invariant: `prepare` reads headers, the picture and the tokenizers, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_i2v import attention
from lowvram_i2v.checkpoint import ModelFolder, open_model
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, Notice
from lowvram_i2v.image import fit_image, read_image
from lowvram_i2v.profile import VramProfile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.video import check_output

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from lowvram_i2v.attention import AttentionBackend

DEFAULT_GUIDANCE = 6.0


@dataclass(frozen=True)
class Job:
    """A request that can be carried out.

    request: with size and flow shift filled in. picture: the whole image, which the text model looks at.
    first_frame: the same, scaled and cropped to the video's size. guidance_scale: None for weights without its
    embedder. negative_prompt: None without classifier-free guidance.
    """

    request: GenerateRequest
    model: ModelFolder
    profile: VramProfile
    device: torch.device
    attend: AttentionBackend
    picture: Image
    first_frame: Image
    prompt: str
    negative_prompt: str | None
    guidance_scale: float | None
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


def prepare(
    request: GenerateRequest, folder: Path, profile: VramProfile, device: torch.device, listen: Listener
) -> Job:
    """Checks request, picture, output, model folder and prompts. Raises one of the four errors, or returns the job."""
    request.check()
    attend = attention.get(profile.attention)
    model = open_model(folder)
    picture = read_image(request.image, listen)
    request = request.resolve(*picture.size)
    assert request.size is not None
    fitted = fit_image(picture, *request.size)
    job = Job(
        request=request,
        model=model,
        profile=profile,
        device=device,
        attend=attend,
        picture=picture,
        first_frame=fitted.image,
        prompt=request.prompt.strip(),
        negative_prompt=_negative_prompt(request),
        guidance_scale=_guidance_scale(request, model),
        listen=listen,
    )
    check_output(request.output, *request.size, job.output_frames)
    _check_tensors(model)
    _check_prompts(job)
    for text in (fitted.description, *request.notices()):
        listen(Notice(text))
    if job.output_frames != request.frames:
        listen(
            Notice(
                f"{model.header.variant.name} weights: the first {request.frames - job.output_frames} of "
                f"{request.frames} frames are dropped, as trained; the video has {job.output_frames}."
            )
        )
    return job


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
    """All components' tensor names and shapes against what their modules would load."""
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
