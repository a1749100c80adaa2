"""Whole runs against the reference: model folder, prompt, picture and noise in; latents and frames out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from goldens import FOLDER, Golden, golden, names, relative_l2
from lowvram_i2v import pipeline
from lowvram_i2v.events import ignore
from lowvram_i2v.image import pixels
from lowvram_i2v.job import Job, prepare
from lowvram_i2v.profile import load_profile
from lowvram_i2v.request import GenerateRequest, nearest_bucket
from lowvram_i2v.sampling.conditioning import draw_noise
from lowvram_i2v.sampling.schedule import flow_sigmas, timesteps_of

ModelOf = Callable[[dict[str, Any]], Path]
RUNS = [name for name in names("H") if "in.img_latents" in golden(name)]
WHOLE_CALLS = [name for name in names("H") if name not in RUNS]
CPU = torch.device("cpu")


def job_of(info: dict[str, Any], model: Path, output: Path) -> Job:
    c = info["config"]
    request = GenerateRequest(
        image=FOLDER / c["image"],
        prompt=c["prompt"],
        output=output,
        negative_prompt=c["negative_prompt"] or "",
        size=(c["width"], c["height"]),
        frames=c["video_length"],
        steps=c["num_inference_steps"],
        flow_shift=c["flow_shift"],
        stability=c["i2v_stability"],
        guidance=c["embedded_guidance_scale"],
        cfg=c["guidance_scale"],
    )
    return prepare(request, model, load_profile("auto"), CPU, ignore)


def run(job: Job, case: Golden, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The phases of `pipeline.generate` on the golden's noise, and what passes between them."""
    seen: dict[str, Tensor] = {}
    calls: list[tuple[Tensor, Tensor]] = []
    predict = pipeline.HunyuanVideoTransformer.predict

    def recording(self: torch.nn.Module, latents: Tensor, *rest: Any) -> Tensor:
        out = predict(self, latents, *rest)
        calls.append((latents, out))
        return out

    def stepping(velocity: Any, conditioning: Any, start: Tensor, sigmas: Tensor, on_step: Any) -> Tensor:
        def keep(number: int, latents: Tensor) -> None:
            seen[f"step{number - 1}.latents_after"] = latents[None]
            on_step(number, latents)

        return denoise(velocity, conditioning, start, sigmas, keep)

    denoise = pipeline.denoise
    monkeypatch.setattr(pipeline.HunyuanVideoTransformer, "predict", recording)
    monkeypatch.setattr(pipeline, "denoise", stepping)
    prompts = pipeline.encode_prompts(job)
    image_latent = pipeline.encode_image(job)
    seen["in.img_latents"] = image_latent[None]
    latents = pipeline.sample(job, pipeline.condition_steps(job, prompts), image_latent, case["in.noise"][0])
    seen["out.frames"] = torch.cat(list(pipeline.decode(job, latents)), dim=1)[None]
    first = calls[:1] if prompts[1] is None else [calls[1], calls[0]]  # the reference puts the unconditional half first
    seen["step0.model_input"] = torch.stack([latents for latents, _ in first])
    seen["step0.model_output"] = torch.stack([out for _, out in first])
    ordered = [prompts[0]] if prompts[1] is None else [prompts[1], prompts[0]]
    seen["text.pooled"] = torch.stack([embeds.pooled_prompt_embeds for embeds in ordered])
    seen["in.pixel_image"] = torch.from_numpy(pixels(job.first_frame))[None]
    rows = case.shape("text.mask")[1]
    seen["text.mask"] = torch.tensor([[int(i < len(e.prompt_embeds)) for i in range(rows)] for e in ordered])
    width = ordered[0].prompt_embeds.shape[1]
    seen["text.states"] = torch.stack(
        [torch.cat([e.prompt_embeds, torch.zeros(rows - len(e.prompt_embeds), width)]) for e in ordered]
    )
    seen["sigmas"] = flow_sigmas(job.request.steps, job.flow_shift)
    seen["timesteps"] = timesteps_of(seen["sigmas"])
    return seen


@pytest.mark.golden
@pytest.mark.parametrize("name", RUNS)
def test_run_equals_the_reference(
    name: str, model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = golden(name)
    job = job_of(case.info, model_of(case.info), tmp_path / "out.mp4")
    seen = run(job, case, monkeypatch)
    for key in sorted(case.tensors.keys() - {"in.noise", "text.mask"}):
        keep = None
        if key == "text.states":
            keep = case["text.mask"].bool()[..., None].expand(case.shape(key))
        assert relative_l2(seen[key], case[key], keep) < (1e-3 if key == "out.frames" else 1e-4), key
    assert torch.equal(seen["text.mask"], case["text.mask"])


@pytest.mark.golden
@pytest.mark.parametrize("name", WHOLE_CALLS)
def test_whole_call_equals_the_reference(
    name: str, model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outermost routine: a picture file, a prompt with blanks around it and a seed; the picture decides."""
    case = golden(name)
    c = case.info["config"]
    info = dict(case.info) | {"weights": {"transformer": "weights_transformer.safetensors"} | case.info["weights"]}
    expected_height, expected_width = case.shape("in.pixel_image")[-2:]
    request = GenerateRequest(
        image=FOLDER / c["i2v_image_path"],
        prompt=c["prompt"],
        output=tmp_path / "out.mp4",
        size=(expected_width, expected_height),
        frames=c["video_length"],
        steps=c["infer_steps"],
        flow_shift=c["flow_shift"],
        stability=c["i2v_stability"],
        guidance=c["embedded_guidance_scale"],
        cfg=c["guidance_scale"],
        seed=c["seed"],
    )
    job = prepare(request, model_of(info), load_profile("auto"), CPU, ignore)
    base = int(c["i2v_resolution"].removeprefix("tiny")) if c["i2v_resolution"].startswith("tiny") else None
    if base is not None:
        assert nearest_bucket(*job.picture.size, base) == (expected_height, expected_width)

    noise = draw_noise(job.latent_shape, request.seed)
    assert torch.equal(noise[None], case["in.noise"])
    assert relative_l2(torch.from_numpy(pixels(job.first_frame))[None], case["in.pixel_image"]) == 0

    image_latent = pipeline.encode_image(job)
    scale = job.model.header.vae.scaling_factor
    assert relative_l2(image_latent[None] / scale, case["mid.image_latent_mean"]) < 1e-5
    steps = pipeline.condition_steps(job, pipeline.encode_prompts(job))
    latents = pipeline.sample(job, steps, image_latent, noise)
    assert relative_l2(latents[None] / scale, case["mid.latent_fed_to_decode"]) < 1e-4
    frames = torch.cat(list(pipeline.decode(job, latents)), dim=1)[None]
    assert relative_l2(frames, case["out.frames"]) < 1e-3

    again = pipeline.encode_image(job)
    assert torch.equal(again, image_latent), "the picture is never encoded in tiles, whatever was decoded before"

    monkeypatch.setattr(pipeline, "encode_image", lambda job: image_latent)
    video = pipeline.generate(replace(request, output=tmp_path / "all.mp4"), job.model.path, job.profile, CPU, ignore)
    assert video.stat().st_size > 0
