"""The rule table of names against the reference tables: all 856 (852) names of the real model, in both directions."""

from __future__ import annotations

import pytest
import torch
from transformer_layouts import tables

from lowvram_i2v.convert.names import COMFY, DIFFUSERS, OFFICIAL, Place, from_official, row_counts, to_official
from lowvram_i2v.convert.shapes import transformer_shapes
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.transformer import under_official_names
from lowvram_i2v.dit.config import TransformerConfig

RELEASED = {
    "token_replace": TransformerConfig(),
    "latent_concat": TransformerConfig(in_channels=33, guidance_embed=False),
}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, torch.bfloat16, lambda: torch.empty(shape, dtype=torch.bfloat16, device="meta"))

    return {name: lazy(tuple(shape)) for name, shape in shapes.items()}


def test_our_model_has_the_official_names() -> None:
    expected = {name: tuple(shape) for name, shape in tables()["official"].items()}
    assert len(expected) == 856
    assert transformer_shapes(RELEASED["token_replace"]) == expected
    concat = transformer_shapes(RELEASED["latent_concat"])
    assert len(concat) == 852
    assert set(concat) == {name for name in expected if not name.startswith("guidance_in.")}


@pytest.mark.parametrize("variant", RELEASED)
@pytest.mark.parametrize("table", ["official_to_comfy_old", "official_to_comfy_new", "official", "diffusers"])
def test_every_tensor_of_the_real_model_comes_back(variant: str, table: str) -> None:
    """Shapes alone, as a 26 GB file is seen before it is read."""
    official = transformer_shapes(RELEASED[variant])
    naming = {"official": OFFICIAL, "diffusers": DIFFUSERS}.get(table, COMFY)
    theirs = {name: official[name] for name in official}
    if naming == COMFY:
        theirs = {tables()[table][name]: shape for name, shape in official.items()}
    if naming == DIFFUSERS:
        names = {part[0] for name in official for part in tables()["official_to_diffusers"][name]}
        theirs = {name: tuple(tables()["diffusers"][name]) for name in names}
        assert len(theirs) == (1264 if variant == "token_replace" else 1260)
        theirs["x_embedder.proj.weight"] = official["img_in.proj.weight"]
    tensors, faults = under_official_names(on_meta(theirs), naming)
    assert not faults
    assert {name: tensor.shape for name, tensor in tensors.items()} == official


def test_the_way_out_is_the_reference_table() -> None:
    for official, parts in tables()["official_to_diffusers"].items():
        assert from_official(DIFFUSERS, official) == tuple(name for name, _, _ in parts)
        for index, (name, rows, operation) in enumerate(parts):
            swapped = operation == "swap_halves"
            assert to_official(DIFFUSERS, name) == Place(official, index, len(parts), swapped)
            counts = row_counts(len(parts), parts[-1][1][1] if rows else 0, 3072)
            assert not rows or rows == [sum(counts[:index]), sum(counts[: index + 1])]
    for official, name in tables()["official_to_comfy_new"].items():
        assert from_official(COMFY, official) == (name,)


@pytest.mark.parametrize("naming", [OFFICIAL, COMFY, DIFFUSERS])
@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        "img_in.proj",
        "img_in.proj.scale",
        "double_blocks.x.img_mod.linear.weight",
        "lm_head.weight",
        "a" * 999,
    ],
)
def test_foreign_names_have_no_place(naming: str, name: str) -> None:
    assert to_official(naming, name) is None


def test_scale_is_a_norms_weight_only() -> None:
    assert to_official(COMFY, "single_blocks.3.norm.key_norm.scale") == Place("single_blocks.3.k_norm.weight")
    assert to_official(COMFY, "single_blocks.3.linear1.scale") is None


def test_incomplete_or_misshapen_rows_are_faults() -> None:
    whole = {f"transformer_blocks.0.attn.to_{part}.weight": (8, 8) for part in "qkv"}
    lacking = {name: shape for name, shape in whole.items() if "to_k" not in name}
    assert "needs 3 tensors, there are only" in under_official_names(on_meta(lacking), DIFFUSERS)[1][0]
    uneven = whole | {"transformer_blocks.0.attn.to_k.weight": (7, 8)}
    assert "cannot be joined" in under_official_names(on_meta(uneven), DIFFUSERS)[1][0]
    twice = {f"single_blocks.0.norm.key_norm.{suffix}": (8,) for suffix in ("scale", "weight")}
    assert "are the same tensor" in under_official_names(on_meta(twice), COMFY)[1][0]
