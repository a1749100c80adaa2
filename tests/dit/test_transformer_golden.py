"""The transformer against the reference implementation: every intermediate value a golden holds, then its output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from goldens import Golden, golden, names, relative_l2, transformer_config, transformer_weights
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer

TRANSFORMERS = names("A_", "A2_", "B_", "B2_")


def build(info: dict[str, Any], dtype: torch.dtype = torch.float32) -> HunyuanVideoTransformer:
    state = transformer_weights(info)
    with torch.device("meta"):
        model = HunyuanVideoTransformer(transformer_config(info, state))
    model.load_state_dict(state, assign=True)
    return model.to(dtype).eval()


def inputs_of(case: Golden) -> Golden:
    """B2 has the inputs of B."""
    return case if "in.x" in case else golden(names(case.name.split("_")[0].rstrip("0123456789") + "_")[0])


def run(model: nn.Module, case: Golden, sample: int) -> tuple[Tensor, int]:
    """The model on one sample of the golden's batch, its padded text rows cut off; also how many rows were valid."""
    valid = int(case["in.text_mask"][sample].sum())
    guided = model.config.guidance_embed
    with torch.no_grad():
        out = model(
            case["in.x"][sample],
            case["in.t"][sample : sample + 1],
            case["in.text_states"][sample, :valid],
            case["in.text_states_2"][sample],
            case["in.guidance"][sample : sample + 1] / 1000 if guided else None,
            (case["in.freqs_cos"][:, ::2], case["in.freqs_sin"][:, ::2]),
        )
    return out, valid


@pytest.mark.golden
@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_output_equals_the_reference(name: str, dtype: torch.dtype, gate: float) -> None:
    case = golden(name)
    model, inputs = build(case.info, dtype), inputs_of(case)
    out = torch.stack([run(model, inputs, sample)[0] for sample in range(len(inputs["in.x"]))])
    assert relative_l2(out, case["out"]) < gate


@pytest.mark.golden
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if not name.startswith("A2")])
def test_every_intermediate_value_equals_the_reference(name: str) -> None:
    case = golden(name)
    model, inputs = build(case.info), inputs_of(case)
    seen: dict[str, Tensor] = {}
    hooks = [("img_in", model.img_in), ("txt_in", model.txt_in), ("final_layer", model.final_layer)]
    hooks += [(f"double_blocks.{i}", block) for i, block in enumerate(model.double_blocks)]
    hooks += [(f"single_blocks.{i}", block) for i, block in enumerate(model.single_blocks)]

    def record(key: str, value: Any) -> None:
        if isinstance(value, tuple):
            seen[f"{key}.img"], seen[f"{key}.txt"] = value
        else:
            seen[key] = value

    for key, module in hooks:
        module.register_forward_hook(lambda _, __, value, key=key: record(key, value))
    _, valid = run(model, inputs, 0)
    with torch.no_grad():
        guidance = inputs["in.guidance"][:1] / 1000 if model.config.guidance_embed else None
        vectors = model.vectors(inputs["in.t"][:1], inputs["in.text_states_2"][:1], guidance)
    seen["vec"] = vectors[0]
    if len(vectors) == 2:
        seen["token_replace_vec"] = vectors[1]

    middles = [key for key in case.tensors if key.startswith("mid.")]
    assert middles
    for key in middles:
        actual, shape = seen[key.removeprefix("mid.")], case.shape(key)
        if actual.dim() == 2:  # rows of padded text are not computed here, and nobody sees them
            padded = torch.zeros(shape)
            padded[0, : len(actual)] = actual
            keep = torch.zeros(shape, dtype=torch.bool)
            keep[0, : len(actual)] = True
            assert len(actual) == shape[1] or shape[1] - len(actual) == len(inputs["in.text_mask"][0]) - valid
            assert relative_l2(padded, case[key], keep) < 1e-5, key
        else:
            assert relative_l2(actual[None], case[key]) < 1e-5, key
