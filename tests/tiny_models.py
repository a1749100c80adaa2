"""Fixtures: tiny released trees and model folders, made once a session. Copies share the files' data (hard links), so
tests replace files (`rewrite`, `save`) and never change them in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_i2v.convert.convert import convert
from lowvram_i2v.synth import synth

TRANSFORMER = "hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.pt"
VAE = "hunyuan-video-i2v-720p/vae/pytorch_model.pt"

Made = Callable[..., Path]


def _link_tree(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, copy_function=os.link))


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def save(values: Any, path: Path, **options: Any) -> None:
    path.unlink(missing_ok=True)
    torch.save(values, path, **options)


def cut(path: Path, bytes_off: int) -> None:
    rewrite(path, path.read_bytes()[:-bytes_off])


@pytest.fixture(scope="session")
def released_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made: dict[str, Path] = {}

    def released(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("released") / "ckpts"
            synth(made[variant], "tiny", variant)
        return made[variant]

    return released


@pytest.fixture(scope="session")
def model_once(released_once: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    made: dict[tuple[str, str], Path] = {}

    def model(variant: str, scheme: str) -> Path:
        key = variant, scheme
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model") / "model"
            convert(released_once(variant), made[key], scheme)
        return made[key]

    return model


@pytest.fixture
def released(released_once: Made, tmp_path: Path) -> Path:
    """A tiny released tree of one's own."""
    return _link_tree(released_once("token_replace"), tmp_path / "ckpts")


@pytest.fixture
def model(model_once: Made, tmp_path: Path) -> Path:
    """A tiny model folder of one's own."""
    return _link_tree(model_once("token_replace", "bf16"), tmp_path / "model")
