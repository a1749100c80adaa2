"""A kernel or an attention backend that fails its self-test on a card is not used there, and the user is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvram_i2v import job as jobs
from lowvram_i2v import pipeline
from lowvram_i2v.attention import choice
from lowvram_i2v.dit import chunked
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import PlatformError, RequestError
from lowvram_i2v.events import Event, Notice
from lowvram_i2v.kernels.ops import PLAIN, Ops
from lowvram_i2v.plan import Machine, Video, fits
from lowvram_i2v.profile import load_profile
from lowvram_i2v.sizes import sizes_of
from lowvram_i2v.synth.headers import model_headers
from lowvram_i2v.variant import VARIANTS

BROKEN = replace(PLAIN, gelu=lambda x, out: out.fill_(1))


def job(said: list[Event], compute: str = "w8a16") -> Any:
    header = SimpleNamespace(transformer=TransformerConfig(hidden_size=256, heads=2), scheme="int8")
    return SimpleNamespace(
        model=SimpleNamespace(header=header),
        profile=SimpleNamespace(compute=compute),
        device=torch.device("cpu"),
        listen=said.append,
    )


def test_a_broken_kernel_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: torch.device, refused: Any = ()) -> Ops:
        return replace(BROKEN, **{name: getattr(PLAIN, name) for name in refused})

    monkeypatch.setattr(pipeline, "choose", choose)
    said: list[Event] = []
    ops = pipeline._trusted_ops(job(said), torch.float32)
    assert ops == PLAIN
    assert len(said) == 1
    assert isinstance(said[0], Notice)
    assert "gelu" in said[0].text
    assert "self-test" in said[0].text


@pytest.mark.parametrize(("compute", "found"), [("w8a16", 0), ("w8a8", 1)])
def test_only_what_the_profile_uses_is_tested(compute: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_image(*_: object) -> None:
        raise RuntimeError("no kernel image")

    broken = replace(PLAIN, linear=no_image)
    monkeypatch.setattr(pipeline, "choose", lambda device, refused=(): PLAIN if refused else broken)
    said: list[Event] = []
    pipeline._trusted_ops(job(said, compute), torch.float32)
    assert len(said) == found


def test_what_neither_multiplies_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card whose torch has no product of rows with scales."""

    def no_product(*_: object) -> None:
        raise RuntimeError("_scaled_mm is not supported")

    broken = replace(PLAIN, linear=no_product)
    monkeypatch.setattr(pipeline, "choose", lambda device, refused=(): broken)
    with pytest.raises(PlatformError, match=r"own linear.*_scaled_mm is not supported") as error:
        pipeline._trusted_ops(job([], "w8a8"), torch.float32)
    assert 'compute = "w8a16"' in error.value.remedy


def test_without_kernels_there_is_nothing_to_test() -> None:
    said: list[Event] = []
    assert pipeline._trusted_ops(job(said), torch.float32) is PLAIN
    assert not said


def test_all_ops_in_use_are_tested() -> None:
    source = Path(chunked.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"\bops\.([a-z]\w+)\(", source)) == set(chunked.OPS)


def test_an_old_card_has_room_for_small_videos_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's attention writes all scores there: the plan counts them, and the user is told why."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    said: list[Event] = []
    profile = jobs._attending(load_profile("8gb-fast"), 128, torch.device("cuda"), said.append)
    assert profile.attention == "sdpa"
    assert isinstance(said[0], Notice)
    assert "RTX 2080 has compute capability 7.5" in said[0].text
    sizes, machine = sizes_of(model_headers("full", VARIANTS["token_replace"], "int8")), Machine(8 * 2**30, None)
    small, large = Video(256, 256, 17), Video(1280, 720, 129)
    assert all(fits(sizes, video, profile=profile, machine=machine) for video in (small, large))
    old = replace(machine, scores=True)
    assert fits(sizes, small, profile=profile, machine=old)
    assert not fits(sizes, large, profile=profile, machine=old)


def attending(backend: str) -> tuple[str, list[Event]]:
    """Which attention runs on the CPU where a profile names one, and what is said."""
    said: list[Event] = []
    profile = replace(load_profile("auto"), attention=backend)
    return jobs._attending(profile, 128, torch.device("cpu"), said.append).attention, said


def test_attention_that_cannot_run_is_replaced_and_named() -> None:
    assert attending("sdpa") == ("sdpa", [])
    assert attending("triton") == (
        "sdpa",
        [Notice("attention: sdpa (triton cannot run here: it needs a CUDA device)")],
    )
    with pytest.raises(RequestError, match="'magic' is not known"):
        attending("magic")


def test_auto_says_what_it_took() -> None:
    name, said = attending(choice.AUTO)
    assert name == "sdpa"
    assert isinstance(said[0], Notice)
    assert said[0].text.startswith("attention: sdpa (")
