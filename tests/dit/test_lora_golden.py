"""Merging a LoRA file of the released trainer's family against the reference, and the other family's scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from goldens import FOLDER, Golden, Sampled, golden, names, relative_l2, transformer_config, weights
from lowvram_i2v.dit.lora import KOHYA_PREFIX, OFFICIAL_PREFIX, merge_lora, read_lora
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import CheckpointError

LORAS = [name for name in names("I_") if (FOLDER / f"{name}_kohya.safetensors").is_file()]
pytestmark = [pytest.mark.golden, pytest.mark.parametrize("name", LORAS)]


def build(case: Golden) -> tuple[HunyuanVideoTransformer, Golden]:
    """The model that the LoRA was merged into, and the golden whose inputs were used."""
    inputs = golden(names(case.info["config"]["inputs"].split()[-1])[0])
    state = weights(case.info["weights"]["file"])
    model = HunyuanVideoTransformer(transformer_config(inputs.info, state))
    model.load_state_dict(state)
    return model.eval(), inputs


def run(model: nn.Module, case: Golden) -> torch.Tensor:
    valid = int(case["in.text_mask"][0].sum())
    rope = (case["in.freqs_cos"][:, ::2], case["in.freqs_sin"][:, ::2])
    text = case["in.text_states"][0, :valid], case["in.text_states_2"][0]
    with torch.no_grad():
        return model(case["in.x"][0], case["in.t"], *text, case["in.guidance"] / 1000, rope)[None]


def test_merged_weights_and_output_equal_the_reference(name: str) -> None:
    case = golden(name)
    model, inputs = build(case)
    pairs = read_lora(FOLDER / f"{name}_kohya.safetensors", model)
    assert sorted(pairs) == sorted(case.info["config"]["modules"])
    merge_lora(model, pairs, case.info["config"]["scale"])
    state = model.state_dict()
    for key in [key for key in case.tensors if key.startswith("merged.")]:
        weight, _, rows = key.removeprefix("merged.").partition(".rows_")
        first, last = (int(number) for number in rows.split("_"))
        assert relative_l2(state[weight][first:last], case[key]) < 1e-6, key
    assert relative_l2(run(model, inputs), case["out"]) < 1e-5


def test_kohya_files_scale_by_alpha_over_rank(name: str, tmp_path: Path) -> None:
    case = golden(name)
    model, inputs = build(case)
    tensors = load_file(FOLDER / f"{name}_kohya.safetensors")
    renamed = {key.replace(OFFICIAL_PREFIX, KOHYA_PREFIX): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "kohya.safetensors")
    merge_lora(model, read_lora(tmp_path / "kohya.safetensors", model), case.info["config"]["scale"])
    assert relative_l2(run(model, inputs), case["out_if_alpha_over_rank_were_applied"]) < 1e-5
    assert isinstance(case["out"], (torch.Tensor, Sampled))


def test_what_does_not_fit_is_listed(name: str, tmp_path: Path) -> None:
    case = golden(name)
    model, _ = build(case)
    tensors = load_file(FOLDER / f"{name}_kohya.safetensors")
    up = sorted(key for key in tensors if key.endswith("lora_up.weight"))
    del tensors[up[0]]
    tensors[up[1]] = tensors[up[1]][:-1].clone()
    tensors["lora_te_something.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="missing") as caught:
        read_lora(tmp_path / "bad.safetensors", model)
    assert all(text in str(caught.value) for text in ("is not", "lora_te_something"))
