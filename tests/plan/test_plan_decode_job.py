"""`decode` before its first weight: it asks for the VAE and for the memory that decoding takes, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Made, cut
from tiny_models import model as model
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from lowvram_i2v import job
from lowvram_i2v.errors import CheckpointError, ResourceError
from lowvram_i2v.events import Planned
from lowvram_i2v.job import VideoJob, prepare_decode
from lowvram_i2v.latents_file import open_latents, save_latents
from lowvram_i2v.profile import load_profile
from lowvram_i2v.request import GenerateRequest

MIB = 2**20


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU that is only asked how much is free."""
    free = {"vram": 600 * MIB, "ram": 64 * 2**30}
    monkeypatch.setattr(job, "free_vram", lambda _: free["vram"])
    monkeypatch.setattr(job, "available_ram", lambda: free["ram"])
    monkeypatch.setattr(job, "multiplies_float8", lambda _: True)
    monkeypatch.setattr(job.choice, "too_old", lambda _: None)
    return free


def prepared(model: Path, folder: Path) -> tuple[VideoJob, list[Planned]]:
    request = GenerateRequest(Path("p.png"), "x", Path("o.mp4"), frames=9, size=(64, 48), flow_shift=7.0)
    saved, events = folder / "a.latents.safetensors", []
    save_latents(saved, torch.zeros(16, 3, 6, 8), request.to_settings(variant="token_replace", model=str(model)))
    chosen = load_profile("auto"), torch.device("cuda"), folder / "o.mp4"
    made = prepare_decode(open_latents(saved), model, *chosen, events.append)
    return made, [event for event in events if isinstance(event, Planned)]


def test_a_folder_in_which_only_the_vae_is_whole_decodes(model: Path, tmp_path: Path, card: dict[str, int]) -> None:
    (model / "transformer.safetensors").unlink()
    (model / "tokenizer" / "tokenizer.json").unlink()
    cut(model / "text_encoder.safetensors", 10)
    made, planned = prepared(model, tmp_path)
    assert list(made.model.files) == ["vae"]
    assert [list(event.vram) for event in planned] == [["decode"]]
    assert made.plan.limit == card["vram"]


def test_a_vae_that_is_not_whole_is_the_only_complaint(model: Path, tmp_path: Path, card: dict[str, int]) -> None:
    (model / "transformer.safetensors").unlink()
    cut(model / "vae.safetensors", 10)
    with pytest.raises(CheckpointError, match=r"vae.safetensors") as refused:
        prepared(model, tmp_path)
    assert "transformer" not in str(refused.value)


def test_a_card_too_small_for_the_decoder_is_refused(model_once: Made, tmp_path: Path, card: dict[str, int]) -> None:
    card["vram"] = 64 * MIB
    with pytest.raises(ResourceError, match="decode needs"):
        prepared(model_once("token_replace", "bf16"), tmp_path)
