"""The attention kernels' tiles as variants to compile: every tile of the tables, for its card."""

from __future__ import annotations

from dataclasses import replace

from compile import Variant

from lowvram_i2v.kernels import attention_dense, attention_int8, attention_quantize, attention_sparse
from lowvram_i2v.kernels.attention_tiles import DENSE, INT8, SHARED_MEMORY, Tile

DIM = 128
MATRIX = {
    ("sm_86", "fp16_acc16"): ("IMMA", "HMMA.16816.F16"),
    ("sm_86", "fp16"): ("IMMA", "HMMA.16816.F32"),
    ("sm_89", "fp8_acc16"): ("IMMA", "QMMA.16832.F16.E4M3"),
    ("sm_89", "fp8"): ("IMMA", "QMMA.16832.F32.E4M3"),
    ("sm_90", "fp8"): ("IGMMA", "QGMMA"),
    ("sm_90", "fp16"): ("IGMMA", "HGMMA"),
    ("sm_120", "fp8_scaled"): ("IMMA", "QMMA.SF"),
}
"""The instructions of Q K and P V."""
VALUES = {"BLOCK": attention_quantize.BLOCK, "DIM": DIM, "UNIT": attention_quantize.UNIT}
VECTORS = ("centre", "k_centre", "v_centre", "v_scale", "reach")


def dense(card: str, tile: Tile, dtype: str = "bf16") -> Variant:
    constants = {"ROWS": tile.rows, "KEYS": tile.keys, "DIM": DIM}
    types = dict.fromkeys(("n_q", "n_kv"), "i32") | {"scale": "fp32", "out": f"*{dtype}"}
    strides = [f"{x}{kind}_stride" for kind in ("", "_head") for x in ("q", "k", "v", "out")]
    types |= dict.fromkeys(strides, "i32")
    types |= dict.fromkeys(("q", "k", "v"), f"*{dtype}")
    name = f"dense {dtype} {tile}"
    return Variant(
        name, attention_dense.dense_kernel, types, constants, int(card[3:]), tile.warps, tile.stages, tuple(strides),
        SHARED_MEMORY[card], ("HGMMA",) if card == "sm_90" else ("HMMA.16816.F32",),
    )  # fmt: skip


def int8(card: str, tile: Tile) -> Variant:
    constants = {"ROWS": tile.rows, "KEYS": tile.keys, "DIM": DIM, "PV": tile.pv}
    strides = ("q_stride", "q_head_stride", "out_stride", "out_head_stride", "padded")
    types = dict.fromkeys((*strides, "n_q", "n_kv"), "i32") | {"factor": "fp32", "q": "*bf16", "out": "*bf16"}
    types |= dict.fromkeys(("k_scale", "v_scale", "v_centre"), "*fp32")
    types |= {"k": "*i8", "v": "*fp8e4nv" if tile.pv.startswith("fp8") else "*fp16"}
    kernel = attention_int8.int8_kernel
    return Variant(
        f"int8 {tile}", kernel, types, constants, int(card[3:]), tile.warps, tile.stages, strides,
        SHARED_MEMORY[card], MATRIX[card, tile.pv],
    )  # fmt: skip


def sparse(card: str, tile: Tile) -> Variant:
    whole = int8(card, tile)
    constants = whole.constants | {"LENGTH": 6, "STAGES": 2 * tile.stages - 1}
    types = whole.types | {"mean_k": "*i8", "mean_v": whole.types["v"], "mean_k_scale": "*fp32", "blocks": "*i32"}
    types |= {"skipped": "*u8", "every": "*i32", "kept": "i32", "text_from": "i32", "mean_padded": "i32"}
    kernel, aligned = attention_sparse.sparse_kernel, (*whole.aligned, "mean_padded")
    return replace(whole, name=f"sparse {tile}", kernel=kernel, types=types, constants=constants, aligned=aligned)


def routing(card: str, tile: Tile) -> Variant:
    """The lists of 1280x720, 129 frames: 1863 key blocks."""
    types = dict.fromkeys(("count", "padded", "kept", "first", "last"), "i32")
    types |= {"scores": "*fp32", "blocks": "*i32", "skipped": "*u8"}
    constants = {"ROWS": tile.rows, "KEYS": tile.keys, "SIZE": 2048}
    return Variant("route_kernel", attention_sparse.route_kernel, types, constants, int(card[3:]), 4, 3, ("padded",))


def quantizers(card: str, tile: Tile) -> list[Variant]:
    """The kernels of `attention_quantize`; they multiply no matrices, so the gate wants none."""
    k, v, sums = {"k": "*bf16"}, {"v": "*bf16"}, ("k_sum", "v_sum", "v_low", "v_high")
    largest = attention_quantize.LARGEST_VALUE[tile.pv]
    code = "*fp8e4nv" if tile.pv.startswith("fp8") else "*fp16"
    strides = [f"{x}{kind}_stride" for x in "kv" for kind in ("", "_head")]
    integers = dict.fromkeys((*strides, "tokens", "chunk", "padded", "parts", "k_count"), "i32")
    floats = dict.fromkeys((*sums, *VECTORS, "scales"), "*fp32") | {"errors": "*i32"}
    made = []
    for name, codes, constants in (
        (
            "statistics_kernel",
            code,
            {"STRIP": attention_quantize.STRIP, "DIM": DIM, "SAMPLED": attention_quantize.SAMPLED},
        ),
        ("keys_kernel", "*i8", {"KEYS": tile.keys, "DIM": DIM}),
        ("values_kernel", code, VALUES | {"EIGHT": tile.pv.startswith("fp8"), "LARGEST": largest}),
        ("centres_kernel", code, {"STRIP": attention_quantize.STRIP, "DIM": DIM}),
        ("shift_kernel", code, {"DIM": DIM, "LARGEST": largest, "UNIT": attention_quantize.UNIT}),
    ):
        types = k | v | integers | floats | {"codes": codes}
        kernel = getattr(attention_quantize, name)
        warps = attention_quantize.WARPS if name == "values_kernel" else 4
        aligned = (
            *(x for x in strides if x in kernel.arg_names),
            *(["padded"] if "padded" in kernel.arg_names else []),
        )
        made.append(Variant(f"{name} {tile.pv}", kernel, types, constants, int(card[3:]), warps, 3, aligned))
    return made


def variants(first: bool = False) -> list[tuple[str, Variant]]:
    """(card, variant) of every tile, or of those that the backends use."""
    found = []
    for make, table in ((dense, DENSE), (int8, INT8)):
        for card, tiles in table.items():
            found += [(card, make(card, tile)) for tile in (tiles[:1] if first else tiles)]
    if not first:
        for card, tiles in INT8.items():
            found += [(card, sparse(card, tiles[0])), (card, routing(card, tiles[0]))]
            found += [(card, variant) for variant in quantizers(card, tiles[0])]
    return found
