"""The attention kernels' tiles as variants to compile: every tile of the tables, for its card."""

from __future__ import annotations

from dataclasses import replace

from compile import Variant

from lowvram_i2v.kernels import attention_dense, attention_int8, attention_lists, attention_quantize, attention_sparse
from lowvram_i2v.kernels.attention_quantize import PASSES, SAMPLED, TURN
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
    constants["MEAN_STAGES"] = attention_sparse.MEAN_STAGES
    types = whole.types | {"mean_k": "*i8", "mean_v": whole.types["v"], "mean_k_scale": "*fp32", "blocks": "*i32"}
    types |= {"skipped": "*i32", "every": "*i32", "kept": "i32", "text_from": "i32", "mean_padded": "i32"}
    types |= {"heads": "i32", "query_blocks": "i32"}
    kernel, aligned = attention_sparse.sparse_kernel, (*whole.aligned, "mean_padded")
    return replace(whole, name=f"sparse {tile}", kernel=kernel, types=types, constants=constants, aligned=aligned)


def lists(card: str, tile: Tile) -> list[Variant]:
    """The kernels of `attention_lists`, for 1280x720, 129 frames: 1863 key blocks."""
    sizes = {"ROWS": tile.rows, "KEYS": tile.keys}
    strides = [f"{x}{kind}_stride" for x in "qkv" for kind in ("", "_head")]
    counts = ("count", "words", "kept", "first", "last", "lower", "tokens", "query_blocks", "key_blocks", "blocks")
    counts += ("k_count",)
    floats = ("q_means", "k_means", "k_sums", "v_means", "v_low", "v_high", "k_centre", "v_centre", "reach", "scores")
    types = dict.fromkeys((*strides, *counts), "i32") | dict.fromkeys(floats, "*fp32") | dict.fromkeys("qkv", "*bf16")
    width = {"STRIP": attention_lists.STRIP, "WIDTH": attention_lists.WIDTH}
    made = []
    for name, constants, warps, more in (
        (
            "means_kernel",
            sizes | {"DIM": DIM, "PIECE": attention_lists.PIECE, "SAMPLED": SAMPLED, "TURN": TURN},
            attention_lists.MEANS_WARPS,
            {},
        ),
        ("scores_kernel", {"DIM": DIM, "SIDE": attention_lists.SIDE, "DEPTH": attention_lists.DEPTH}, 4, {}),
        ("centres_kernel", {"KEYS": tile.keys, "DIM": DIM} | width, 4, {}),
        (
            "choice_kernel",
            sizes | {"SIZE": 2048},
            attention_lists.choice_warps(2048),
            {"blocks": "*i32", "skipped": "*i32"},
        ),
    ):
        kernel = getattr(attention_lists, name)
        aligned = tuple(x for x in strides if x in kernel.arg_names)
        shown = f"{name} of lists"
        made.append(Variant(shown, kernel, types | more, constants, int(card[3:]), warps, 3, aligned))
    return made


def quantizers(card: str, tile: Tile, passes: attention_quantize.Passes = PASSES, dtype: str = "bf16") -> list[Variant]:
    """The kernels of `attention_quantize`; that of the keys multiplies by the rotation. Means are float32."""
    sums, code = ("k_sum", "v_sum", "v_low", "v_high"), "*fp8e4nv" if tile.pv.startswith("fp8") else "*fp16"
    strides = [f"{x}{kind}_stride" for x in "kv" for kind in ("", "_head")]
    types = dict.fromkeys((*strides, "tokens", "padded", "parts", "k_count"), "i32") | {
        "k": f"*{dtype}",
        "v": f"*{dtype}",
    }
    types |= dict.fromkeys((*sums, *VECTORS, "scales", "sums"), "*fp32")
    largest, strip = {"LARGEST": attention_quantize.LARGEST_VALUE[tile.pv]}, {"STRIP": attention_quantize.STRIP}
    block = {"BLOCK": attention_quantize.BLOCK, "EIGHT": tile.pv.startswith("fp8")}
    sampled = {"TURN": TURN, "SAMPLED": SAMPLED}
    small = attention_quantize.Pass(0, 8, 3)
    made = []
    for name, codes, how, constants in (
        ("statistics_kernel", code, passes.statistics, sampled),
        ("keys_kernel", "*i8", passes.keys, {"KEYS": tile.keys, "means": None}),
        ("values_kernel", code, passes.values, block | largest),
        ("centres_kernel", code, small, strip),
        ("shift_kernel", code, small, strip | largest),
    ):
        kernel = getattr(attention_quantize, name)
        constants |= {"DIM": DIM} | ({"TILES": how.tiles, "STAGES": how.stages} if how.tiles else {})
        constants |= {"FOLD": attention_quantize.fold(how, DIM)} if "FOLD" in kernel.arg_names else {}
        aligned = tuple(x for x in (*strides, "padded") if x in kernel.arg_names)
        shown = " ".join([name, tile.pv, dtype] + [str(how)] * bool(how.tiles))
        made.append(Variant(shown, kernel, types | {"codes": codes}, constants, int(card[3:]), how.warps, 3, aligned))
    return made


def keys_with_means(card: str, tile: Tile) -> Variant:
    """The kernel that makes codes of K and means of its tiles, for sparse attention."""
    [plain] = [variant for variant in quantizers(card, tile) if variant.kernel is attention_quantize.keys_kernel]
    constants = {name: value for name, value in plain.constants.items() if name != "means"}
    return replace(plain, name=f"{plain.name} means", types=plain.types | {"means": "*fp32"}, constants=constants)


def of_means(card: str, tile: Tile) -> list[Variant]:
    """The kernels that make codes of the means of key blocks."""
    made = quantizers(card, tile, attention_sparse.OF_MEANS, "fp32")
    return [variant for variant in made if "keys" in variant.name or "values" in variant.name]


def variants(first: bool = False) -> list[tuple[str, Variant]]:
    """(card, variant) of every tile, or of those that the backends use, and what makes their codes."""
    found = []
    for make, table in ((dense, DENSE), (int8, INT8)):
        for card, tiles in table.items():
            found += [(card, make(card, tile)) for tile in (tiles[:1] if first else tiles)]
    for card, tiles in INT8.items():
        if first and tiles[0].pv.startswith("fp8"):
            found += [(card, variant) for variant in quantizers(card, tiles[0]) if "values" in variant.name]
            found += [(card, variant) for variant in of_means(card, tiles[0]) if "values" in variant.name]
    for card, tiles in INT8.items():
        found += [(card, keys_with_means(card, tiles[0]))]
    if not first:
        for card, tiles in INT8.items():
            found += [(card, sparse(card, tiles[0]))]
            found += [(card, variant) for variant in lists(card, tiles[0])]
            found += [(card, variant) for variant in quantizers(card, tiles[0])]
            found += [(card, variant) for variant in of_means(card, tiles[0])]
    return found
