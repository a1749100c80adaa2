"""The text encoders and tokenizers of each golden `F_text*`, loaded through the project's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from goldens import FOLDER, Golden, golden, names, weights
from lowvram_i2v.text.clip import build_clip, clip_tensor_name, official_clip_name
from lowvram_i2v.text.encode import black_image
from lowvram_i2v.text.llava import build_llava, llava_tensor_name, official_llava_name
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer


def file_weights(folder: Path, official_name: Any) -> dict[str, torch.Tensor]:
    """All tensors of a published folder under the model folder's names."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in weights(str(path.relative_to(FOLDER))).items():
            if stored := official_name(name):
                state[stored] = value
    return state


def load(model: Any, state: dict[str, torch.Tensor], file_name: Any) -> Any:
    model.load_state_dict({n: state[file_name(n)].clone() for n, _ in model.named_parameters()}, assign=True)
    return model.requires_grad_(False)


@dataclass(repr=False)
class TextGolden:
    golden: Golden
    llava_folder: Path
    clip_folder: Path
    llava_config: dict[str, Any]
    clip_config: dict[str, Any]
    llava_state: dict[str, torch.Tensor]
    clip_state: dict[str, torch.Tensor]
    llava: Any
    clip: Any
    llava_tokenizer: LlavaTokenizer
    clip_tokenizer: ClipTokenizer

    @property
    def cases(self) -> dict[str, Any]:
        return self.golden.info["cases"]

    def image(self, case: str) -> Image.Image:
        """The case's picture; a case that names no file has a black one of the same size."""
        named = FOLDER / self.cases[case]["image"]
        main = Image.open(FOLDER / self.golden.info["config"]["image"]).convert("RGB")
        return Image.open(named).convert("RGB") if named.is_file() else black_image(main)


@pytest.fixture(scope="session", params=names("F_text"))
def text(request: pytest.FixtureRequest) -> TextGolden:
    reference = golden(request.param)
    config = reference.info["config"]
    llava_folder, clip_folder = (FOLDER / name for name in config["hf_folders"])
    llava_config, clip_config = (json.loads((f / "config.json").read_text()) for f in (llava_folder, clip_folder))
    llava_state = file_weights(llava_folder, official_llava_name)
    clip_state = file_weights(clip_folder, official_clip_name)
    return TextGolden(
        reference,
        llava_folder,
        clip_folder,
        llava_config,
        clip_config,
        llava_state,
        clip_state,
        load(build_llava(llava_config, config["hidden_state_skip_layer"]), llava_state, llava_tensor_name),
        load(build_clip(clip_config), clip_state, clip_tensor_name),
        LlavaTokenizer(llava_folder, config["text_len"]),
        ClipTokenizer(clip_folder, clip_config.get("max_position_embeddings", 77)),
    )
