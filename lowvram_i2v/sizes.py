"""What planning needs of a model: bytes of its parts as they lie in memory, from headers alone.

Invariant: sizes are those of a CUDA run (16-bit values beside quantized weights), whatever machine asks. No weight is
read; modules are built on the meta device only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import Variant

if TYPE_CHECKING:
    from lowvram_i2v.checkpoint import ModelFolder

ELEMENT = 2
"""Bytes of a value that a CUDA run computes with."""


@dataclass(frozen=True)
class ModelSizes:
    """Bytes, where no unit is said.

    scheme: how the transformer's blocks are stored; None if they are not quantized.
    slabs: of each block in the loop, in order. modulation: of each block before the loop.
    loop, before: weights outside the blocks, in the loop and before it.
    text_encoder, text_file: the LLaVA's config.json and tensor name -> bytes in its file. clip: all its weights.
    """

    variant: Variant
    transformer: TransformerConfig
    vae: VaeConfig
    scheme: str | None
    slabs: tuple[int, ...]
    modulation: tuple[int, ...]
    loop: int
    before: int
    text_encoder: dict[str, Any]
    text_file: dict[str, int]
    clip: int

    @cached_property
    def text_phase(self) -> tuple[int, int]:
        """Video memory and RAM while prompts are encoded: `text_bytes`."""
        from lowvram_i2v.text.streamed import text_bytes

        return text_bytes(self.text_encoder, self.text_file, ELEMENT)


def sizes_of(model: ModelFolder) -> ModelSizes:
    """The sizes of an opened model folder, or of headers that only exist in memory."""
    import torch

    from lowvram_i2v.dit.conditioning import is_conditioning, is_embedder, is_modulation
    from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
    from lowvram_i2v.streaming.load import slab_bytes

    header = model.header
    transformer = model.build("transformer", lambda: HunyuanVideoTransformer(header.transformer))
    blocks = transformer.blocks()

    def in_loop(name: str) -> bool:
        return not is_conditioning(name)

    def outside(only: Callable[[str], bool]) -> int:
        return sum(
            ELEMENT * tensor.numel()
            for name, tensor in transformer.state_dict().items()
            if only(name) and not is_in_block(name)
        )

    schemes = (model.scheme_of("transformer", name) for name, _ in transformer.named_modules() if is_in_block(name))
    return ModelSizes(
        variant=header.variant,
        transformer=header.transformer,
        vae=header.vae,
        scheme=next((scheme.name for scheme in schemes if scheme is not None), None),
        slabs=tuple(slab_bytes(blocks, torch.bfloat16, in_loop)),
        modulation=tuple(slab_bytes(blocks, torch.bfloat16, is_modulation)),
        loop=outside(in_loop),
        before=outside(is_embedder),
        text_encoder=header.text_encoder,
        text_file={name: entry.bytes for name, entry in model.files["text_encoder"].entries.items()},
        clip=sum(entry.bytes for entry in model.files["text_encoder_2"].entries.values()),
    )
