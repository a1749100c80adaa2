"""How the transformer's tensors are called: officially (our names), inside ComfyUI, and in diffusers.

ROWS is the whole truth, one line a layer; `{i}` is a block's number. diffusers splits some layers by rows: its names
are then several, joined in their order. It also stores one layer with its halves swapped.

Invariant: of every layer all tensors (`.weight`, `.bias`) go the same way, so a name is looked up without its suffix.
No torch here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

OFFICIAL, COMFY, DIFFUSERS = "official", "ComfyUI", "diffusers"
SWAPPED = "final_layer.adaLN_modulation.1"  # official: shift, scale; diffusers: scale, shift

REFINER = "txt_in.individual_token_refiner.blocks.{i}"
REFINER_D = "context_embedder.token_refiner.refiner_blocks.{i}"
DOUBLE, DOUBLE_D = "double_blocks.{i}", "transformer_blocks.{i}"
SINGLE, SINGLE_D = "single_blocks.{i}", "single_transformer_blocks.{i}"

ROWS: tuple[tuple[str, str, str], ...] = (
    # official, ComfyUI ("=": the same), diffusers
    ("img_in.proj", "=", "x_embedder.proj"),
    ("txt_in.input_embedder", "=", "context_embedder.proj_in"),
    *(
        (f"txt_in.{ours}", f"txt_in.{comfy}", f"context_embedder.time_text_embed.{theirs}")
        for ours, comfy, theirs in (
            ("t_embedder.mlp.0", "t_embedder.in_layer", "timestep_embedder.linear_1"),
            ("t_embedder.mlp.2", "t_embedder.out_layer", "timestep_embedder.linear_2"),
            ("c_embedder.linear_1", "c_embedder.in_layer", "text_embedder.linear_1"),
            ("c_embedder.linear_2", "c_embedder.out_layer", "text_embedder.linear_2"),
        )
    ),
    (f"{REFINER}.norm1", "=", f"{REFINER_D}.norm1"),
    (f"{REFINER}.norm2", "=", f"{REFINER_D}.norm2"),
    (
        f"{REFINER}.self_attn_qkv",
        f"{REFINER}.self_attn.qkv",
        f"{REFINER_D}.attn.to_q {REFINER_D}.attn.to_k {REFINER_D}.attn.to_v",
    ),
    (f"{REFINER}.self_attn_proj", f"{REFINER}.self_attn.proj", f"{REFINER_D}.attn.to_out.0"),
    (f"{REFINER}.mlp.fc1", f"{REFINER}.mlp.0", f"{REFINER_D}.ff.net.0.proj"),
    (f"{REFINER}.mlp.fc2", f"{REFINER}.mlp.2", f"{REFINER_D}.ff.net.2"),
    (f"{REFINER}.adaLN_modulation.1", "=", f"{REFINER_D}.norm_out.linear"),
    ("time_in.mlp.0", "time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "=", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "=", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.mlp.0", "guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.mlp.2", "guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    *(
        (f"{DOUBLE}.{part}_{ours}", f"{DOUBLE}.{part}_{comfy}", " ".join(f"{DOUBLE_D}.{name}" for name in names))
        for part, ours, comfy, *names in (
            ("img", "mod.linear", "mod.lin", "norm1.linear"),
            ("img", "attn_qkv", "attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
            ("img", "attn_q_norm", "attn.norm.query_norm", "attn.norm_q"),
            ("img", "attn_k_norm", "attn.norm.key_norm", "attn.norm_k"),
            ("img", "attn_proj", "attn.proj", "attn.to_out.0"),
            ("img", "mlp.fc1", "mlp.0", "ff.net.0.proj"),
            ("img", "mlp.fc2", "mlp.2", "ff.net.2"),
            ("txt", "mod.linear", "mod.lin", "norm1_context.linear"),
            ("txt", "attn_qkv", "attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ("txt", "attn_q_norm", "attn.norm.query_norm", "attn.norm_added_q"),
            ("txt", "attn_k_norm", "attn.norm.key_norm", "attn.norm_added_k"),
            ("txt", "attn_proj", "attn.proj", "attn.to_add_out"),
            ("txt", "mlp.fc1", "mlp.0", "ff_context.net.0.proj"),
            ("txt", "mlp.fc2", "mlp.2", "ff_context.net.2"),
        )
    ),
    (
        f"{SINGLE}.linear1",
        "=",
        f"{SINGLE_D}.attn.to_q {SINGLE_D}.attn.to_k {SINGLE_D}.attn.to_v {SINGLE_D}.proj_mlp",
    ),
    (f"{SINGLE}.linear2", "=", f"{SINGLE_D}.proj_out"),
    (f"{SINGLE}.q_norm", f"{SINGLE}.norm.query_norm", f"{SINGLE_D}.attn.norm_q"),
    (f"{SINGLE}.k_norm", f"{SINGLE}.norm.key_norm", f"{SINGLE_D}.attn.norm_k"),
    (f"{SINGLE}.modulation.linear", f"{SINGLE}.modulation.lin", f"{SINGLE_D}.norm.linear"),
    ("final_layer.linear", "=", "proj_out"),
    (SWAPPED, "=", "norm_out.linear"),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of another naming belongs: part `index` of `count` of the official tensor `name`, whose halves
    are to be `swapped`."""

    name: str
    index: int = 0
    count: int = 1
    swapped: bool = False


def to_official(naming: str, name: str) -> Place | None:
    """Where a tensor called `name` in `naming` belongs; None if the transformer has no such tensor."""
    pattern, suffix, number = _split(name)
    if naming == COMFY and suffix == "scale" and pattern.endswith(("query_norm", "key_norm")):
        suffix = "weight"  # the older spelling of a norm's weight, no quantization scale
    found = _places(naming).get(pattern)
    if found is None or suffix not in ("weight", "bias"):
        return None
    official, index, count = found
    swapped = naming == DIFFUSERS and official == SWAPPED
    return Place(f"{official.replace('{i}', number)}.{suffix}", index, count, swapped)


def from_official(naming: str, name: str) -> tuple[str, ...]:
    """The names in `naming` of the official tensor `name`, in the order in which their rows are joined.

    Raises KeyError if the transformer has no such tensor.
    """
    pattern, suffix, number = _split(name)
    return tuple(f"{part.replace('{i}', number)}.{suffix}" for part in _parts(naming)[pattern])


def row_counts(parts: int, rows: int, hidden: int) -> list[int]:
    """The rows of each part of a tensor of `rows` rows: equal thirds of a fused q, k, v; for a single block's linear1
    q, k and v have `hidden` rows each and the MLP the rest."""
    return [hidden] * 3 + [rows - 3 * hidden] if parts == 4 else [rows // parts] * parts


def _split(name: str) -> tuple[str, str, str]:
    """Layer with `{i}` for the block's number, last part of the name, the number."""
    layer, _, suffix = name.rpartition(".")
    found = re.search(r"blocks\.(\d{1,6})\.", layer)
    return (
        (layer[: found.start(1)] + "{i}" + layer[found.end(1) :] if found else layer),
        suffix,
        found[1] if found else "",
    )


@cache
def _parts(naming: str) -> dict[str, tuple[str, ...]]:
    """Official layer -> layers."""
    column = (OFFICIAL, COMFY, DIFFUSERS).index(naming)
    return {row[0]: tuple((row[0] if row[column] == "=" else row[column]).split()) for row in ROWS}


@cache
def _places(naming: str) -> dict[str, tuple[str, int, int]]:
    """Layer -> official layer, index, count."""
    return {
        part: (official, index, len(parts))
        for official, parts in _parts(naming).items()
        for index, part in enumerate(parts)
    }
