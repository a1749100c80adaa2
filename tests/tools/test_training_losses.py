"""A few steps lower each loss, and the batched forward passes are the runtime's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_micro as micro
from PIL import Image

from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.text.encode import encode_prompt
from tools.train_demo import flow, latents, text, vae
from tools.train_demo.batched import Prompts, velocity
from tools.train_demo.batched_vae import plain_way
from tools.train_demo.loop import averaged, generators, learning_rate, parts
from tools.train_demo.sizes import DEMO_SIZE, GUIDANCE, MOST_BYTES, component_bytes


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    micro.train_all(folder)
    return folder


def test_the_vae_learns(work: Path) -> None:
    torch.manual_seed(0)
    model, run = vae.Vae(micro.MICRO.size.vae), micro.run(work)
    with micro.clips() as clips:
        videos = clips.get(0).frames[:2]

    @torch.no_grad()
    def loss() -> float:
        return float(vae.step_losses(model, videos, *generators(run, 0), plain_way(run.device))["loss"])

    before = loss()
    model.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["model"])
    assert loss() < 0.9 * before
    latents = torch.cat(
        [vae.load(micro.MICRO.size.vae, run).latents(vae.as_floats(video)).flatten() for video in videos]
    )
    assert vae.trained_config(work).scaling_factor == pytest.approx(1 / float(latents.std()), rel=0.3)


def test_the_text_encoders_learn(work: Path) -> None:
    with micro.clips() as clips:
        chunk = clips.get(0)
    encoders = text.TextEncoders(work)
    encoders.start(0)
    torch.manual_seed(0)
    model = text.WithHeads(encoders, micro.COUNTS)
    pixels = encoders.pixels(chunk.frames[:, 0])

    @torch.no_grad()
    def loss() -> float:
        return float(model.losses(chunk.prompts, pixels, torch.zeros(4, 3, 8, 8), chunk.labels)["loss"])

    before = loss()
    model.load_state_dict(torch.load(work / "text.pt", weights_only=True)["model"])
    assert loss() < 0.95 * before


def test_the_transformer_learns(work: Path) -> None:
    run, config = micro.run(work), micro.MICRO.size.transformer
    with micro.clips() as clips:
        chunk = latents.encode(clips.get(0), latents.load_encoders(micro.MICRO, run), run)
    videos, model = chunk["latents"].float(), flow.start(config)
    prompts, rope = Prompts(chunk["rows"], chunk["lengths"], chunk["pooled"]), _rope(videos)

    @torch.no_grad()
    def loss() -> float:
        noised, sigmas, wanted = flow.disturb(videos, generators(run, 0)[1])
        made = velocity(model, noised, sigmas * 1000, prompts, GUIDANCE, rope)
        return float(flow.flow_losses(made, wanted, sigmas)["loss"])

    before = loss()
    model.load_state_dict(torch.load(work / "flow.pt", weights_only=True)["model"])
    assert loss() < 0.98 * before


def test_the_first_frame_is_the_picture_and_is_not_judged() -> None:
    latents = torch.randn(3, 16, 2, 4, 4)
    noised, sigmas, wanted = flow.disturb(latents, torch.Generator().manual_seed(0))
    assert torch.equal(noised[:, :, 0], latents[:, :, 0])
    assert not torch.equal(noised[:, :, 1], latents[:, :, 1])
    step = noised - sigmas[:, None, None, None, None] * wanted  # the Euler loop's way to sigma 0
    assert torch.allclose(step[:, :, 1], latents[:, :, 1], atol=1e-5)
    worse = wanted.clone()
    worse[:, :, 0] += 1
    assert flow.flow_losses(worse, wanted, sigmas)["loss"] == 0


def test_a_batch_is_computed_as_the_runtime_computes_one_sample() -> None:
    """Two prompts of different length, padded, with random modulation."""
    config = micro.MICRO.size.transformer
    torch.manual_seed(0)
    model = HunyuanVideoTransformer(config).requires_grad_(False)
    latents, rows, lengths = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 7, 16), torch.tensor([7, 4])
    rows[1, 4:] = 0
    pooled, timesteps, rope = torch.randn(2, 16), torch.tensor([900.0, 300.0]), _rope(latents)
    made = velocity(model, latents, timesteps, Prompts(rows, lengths, pooled), GUIDANCE, rope)
    for i in range(2):
        guidance = torch.tensor([GUIDANCE])
        one = model(latents[i], timesteps[i : i + 1], rows[i, : lengths[i]], pooled[i], guidance, rope)
        assert torch.allclose(made[i], one, atol=1e-5)


def test_prompts_are_encoded_as_the_runtime_encodes_them(work: Path) -> None:
    encoders = text.load(micro.run(work))
    with micro.clips() as clips:
        frames = clips.get(0).frames[:2, 0]
    prompts = ["A red square moves left.", "Green."]
    encoded = encoders.encode(prompts, frames)
    for i, prompt in enumerate(prompts):
        picture = Image.fromarray(frames[i].numpy())
        one = encode_prompt(
            encoders.llava, encoders.llava_tokenizer, encoders.clip, encoders.clip_tokenizer, prompt, picture, 4
        )
        length = int(encoded.lengths[i])
        assert torch.allclose(encoded.rows[i, :length], one.prompt_embeds, atol=1e-5)
        assert torch.allclose(encoded.pooled[i], one.pooled_prompt_embeds, atol=1e-5)
        assert not encoded.rows[i, length:].any()


def test_the_demo_has_the_size_that_was_asked_for() -> None:
    sizes = component_bytes(DEMO_SIZE)
    assert 8e6 <= sizes["transformer"][0] <= 12e6
    assert DEMO_SIZE.transformer.head_dim == 128
    assert sum(size for _, size in sizes.values()) < MOST_BYTES


def test_the_learning_rate_rises_stays_and_falls() -> None:
    stage = micro.stage(100, 1, 1.0)
    rates = [learning_rate(stage, step, step / 100) for step in range(100)]
    assert rates[0] == rates[59] == 1.0
    assert 0 < rates[99] < 0.1
    assert rates[61:] == sorted(rates[61:], reverse=True)


def test_parts_hold_everything(work: Path) -> None:
    tensors = averaged(work, "flow")
    pieces = list(parts(tensors))
    assert {key for piece in pieces for key in piece} == set(tensors)
    (work / "flow.pt").rename(work / "flow.whole")
    try:
        again = averaged(work, "flow")
    finally:
        (work / "flow.whole").rename(work / "flow.pt")
    assert all(torch.allclose(again[key], value, atol=1e-3) for key, value in tensors.items())


def _rope(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = micro.MICRO.size.transformer
    t, h, w = latents.shape[2:]
    return rope_table((t, h // 2, w // 2), config.rope_dims, config.rope_theta, 4 * t - 3)
