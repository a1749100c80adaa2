"""The demo model's sizes and its training recipe: every number that decides what comes out, in one place.

Invariants: the structure is the released one (heads of 128, 16 latent channels, 4x8x8 compression, official tensor
names), only narrower; the whole model folder in int8 stays under MOST_BYTES (`python -m tools.train_demo.sizes`). What
costs bytes twice is what stays 16-bit: the VAE, the encoders' tables, and of the transformer all outside its blocks. So
the VAE is narrow, and one refiner block and a thin MLP leave room for depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.synth.sizes import Size, clip_json, llava_json
from lowvram_i2v.vae.config import VaeConfig

MOST_BYTES = 12 * 2**20
OTHER_BYTES = 200_000  # tokenizers, model.json, file headers, row scales: about
SCHEME = "int8"
GUIDANCE = 6.0
"""The only embedded guidance that training shows: the default of a request. The weights know no other."""


@dataclass(frozen=True)
class Stage:
    """How one stage trains.

    steps: optimizer steps in all; the learning rate rises over `warmup`, stays, and falls to nothing at the end.
    batch: clips a step. decay: of the moving average that is kept as the result. chunk_steps: optimizer steps until the
    next chunk of clips joins. most_chunks: the newest so many are drawn from. muon: whether matrices go with Muon
    (`optimizer.py`) instead of AdamW.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    decay: float
    chunk_steps: int
    most_chunks: int
    muon: bool = False


@dataclass(frozen=True)
class Recipe:
    """A model and how it is made. clip_sizes: (width, height) of chunk 0, 1, ..., again from the start."""

    size: Size
    clip_sizes: tuple[tuple[int, int], ...]
    clips_per_chunk: int
    vae: Stage
    text: Stage
    flow: Stage
    decoder: Stage


DEMO_SIZE = Size(
    TransformerConfig(
        hidden_size=256,
        heads=2,
        double_blocks=2,
        single_blocks=4,
        refiner_blocks=1,
        mlp_ratio=2.0,
        text_dim=128,
        pooled_dim=64,
    ),
    VaeConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8),
    llava_text={
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "vocab_size": 768,
    },
    llava_vision={
        "hidden_size": 32,
        "image_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 8,
        "projection_dim": 32,
    },
    clip={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "projection_dim": 64,
        "vocab_size": 768,
    },
    llava_shards=1,
)

DEMO = Recipe(
    DEMO_SIZE,
    clip_sizes=((128, 128), (192, 128), (128, 128), (128, 192)),
    clips_per_chunk=256,
    vae=Stage(8_000, batch=8, learning_rate=1.5e-3, warmup=100, decay=0.998, chunk_steps=150, most_chunks=8, muon=True),
    text=Stage(2_000, batch=128, learning_rate=1e-3, warmup=100, decay=0.99, chunk_steps=40, most_chunks=40),
    flow=Stage(
        40_000, batch=64, learning_rate=1e-3, warmup=200, decay=0.999, chunk_steps=160, most_chunks=400, muon=True
    ),
    decoder=Stage(
        8_000, batch=8, learning_rate=6e-4, warmup=100, decay=0.998, chunk_steps=150, most_chunks=8, muon=True
    ),
)


SMOKE = Recipe(
    DEMO_SIZE,
    clip_sizes=((64, 64),),
    clips_per_chunk=2,
    vae=Stage(2, batch=1, learning_rate=1e-3, warmup=1, decay=0.9, chunk_steps=2, most_chunks=1, muon=True),
    text=Stage(3, batch=2, learning_rate=1e-3, warmup=1, decay=0.9, chunk_steps=2, most_chunks=1),
    flow=Stage(3, batch=2, learning_rate=5e-4, warmup=1, decay=0.9, chunk_steps=2, most_chunks=1, muon=True),
    decoder=Stage(2, batch=1, learning_rate=1e-3, warmup=1, decay=0.9, chunk_steps=2, most_chunks=1, muon=True),
)
"""The same model on two small clips, to see that everything runs."""


def with_vocabulary(size: Size, llava: int, clip: int) -> Size:
    """The size with embedding tables as long as the tokenizers that were written."""
    return replace(size, llava_text={**size.llava_text, "vocab_size": llava}, clip={**size.clip, "vocab_size": clip})


def component_bytes(size: Size) -> dict[str, tuple[int, int]]:
    """Component -> parameters, and bytes in the model folder: one for a quantized weight, two for all others."""
    from lowvram_i2v.convert.policy import quantizable
    from lowvram_i2v.convert.shapes import clip_shapes, llava_shapes, transformer_shapes, vae_shapes

    ids = dict.fromkeys(("begin", "end", "image", "pad"), 0)
    shapes = {
        "transformer": transformer_shapes(size.transformer),
        "text_encoder": llava_shapes(llava_json(size, ids)),
        "text_encoder_2": clip_shapes(clip_json(size)["text_config"]),
        "vae": vae_shapes(size.vae),
    }
    result = {}
    for component, tensors in shapes.items():
        quantized = {f"{layer}.weight" for layer in quantizable(component, tensors)}
        counts = {name: prod(shape) for name, shape in tensors.items()}
        total = sum(counts.values())
        result[component] = total, 2 * total - sum(counts[name] for name in quantized)
    return result


def main() -> None:
    """Prints the table; fails if the model would be too large to ship."""
    parts = component_bytes(DEMO_SIZE)
    for component, (parameters, size) in parts.items():
        print(f"{component:16} {parameters / 1e6:6.2f} M parameters {size / 2**20:6.2f} MiB")
    total = sum(size for _, size in parts.values()) + OTHER_BYTES
    print(f"{'with all files':16} {total / 2**20:26.2f} MiB of {MOST_BYTES / 2**20:.0f}")
    if total > MOST_BYTES:
        raise SystemExit("too large")


if __name__ == "__main__":
    main()
