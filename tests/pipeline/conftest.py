"""A model folder made from the goldens' weights: the released tree is written, then converted without rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goldens import FOLDER, golden, names, transformer_weights, weights
from lowvram_i2v.convert.convert import convert

ModelOf = Callable[[dict[str, Any]], Path]


def write_released_tree(folder: Path, info: dict[str, Any]) -> None:
    """The released tree with the weights that the golden's settings name."""
    transformer = folder / "hunyuan-video-i2v-720p" / "transformers" / "mp_rank_00_model_states.pt"
    vae = folder / "hunyuan-video-i2v-720p" / "vae"
    transformer.parent.mkdir(parents=True)
    vae.mkdir()
    torch.save({"module": transformer_weights(info)}, transformer)
    torch.save(dict(weights(info["weights"]["vae"])), vae / "pytorch_model.pt")
    config = golden(names("E_vae_plain")[0]).info["config"] | info.get("vae", {})
    (vae / "config.json").write_text(json.dumps(config))
    for encoder in ("text_encoder_i2v", "text_encoder_2"):
        shutil.copytree(FOLDER / info["weights"]["hf"] / encoder, folder / encoder)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """Golden settings -> model folder; goldens with the same weights share one."""
    made: dict[str, Path] = {}

    def model(info: dict[str, Any]) -> Path:
        key = json.dumps([info["weights"], info.get("vae")], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            write_released_tree(folder / "released", info)
            variant = info["config"]["i2v_condition_type"]
            convert(folder / "released", folder / "model", "fp32", variant=variant)
            shutil.rmtree(folder / "released")
            made[key] = folder / "model"
        return made[key]

    return model


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test encodes by itself."""
    monkeypatch.setenv("LOWVRAM_I2V_CACHE", str(tmp_path_factory.mktemp("cache")))
