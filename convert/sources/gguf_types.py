"""GGUF block types: the tensors decode themselves (gguf_file.py); here they only get their name."""

from __future__ import annotations

from collections import Counter

from lowvram_i2v.convert.sources.containers import GGUF, Container
from lowvram_i2v.convert.sources.gguf_file import PLAIN, check_types
from lowvram_i2v.convert.sources.quantization import Decoded


def label(container: Container) -> str | None:
    """After the type of most tensors: a "Q4_K_M" file has some of Q5_K and Q6_K."""
    if container.kind != GGUF:
        return None
    types = Counter(container.labels[name] for name in container.tensors)
    blocks = [name for name, _ in types.most_common() if name not in PLAIN]
    return f"GGUF {blocks[0]}" + (f" with {', '.join(blocks[1:])}" if blocks[1:] else "") if blocks else "GGUF, none"


def decode(container: Container) -> Decoded:
    check_types(container.path, {name: container.labels[name] for name in container.tensors})
    return Decoded(container.tensors, label(container) or "")
