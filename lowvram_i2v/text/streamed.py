"""The LLaVA without its weights in memory: decoder layers stream from the file, token embeddings are read by the row.

Of the released model's 7.4 billion parameters that are used, 0.3 billion (vision tower and projector) are loaded; of
its decoder, two layers are on the device at a time, each copied while the one before it runs. One forward reads every
layer once, so that more of them on the device would save nothing.

Invariants: the same bits as the loaded model, since the same library code runs on the same weights; the model is its
old self after the `with`. What it takes is known beforehand (`text_bytes`, arithmetic on the file's header).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.kernels.compute import scratch
from lowvram_i2v.kernels.scheme import SCHEMES, is_marker
from lowvram_i2v.safetensors_file import TORCH_DTYPES, SafetensorsFile
from lowvram_i2v.streaming.block_stream import FEWEST_SLOTS, streamed_places
from lowvram_i2v.streaming.feed import feed
from lowvram_i2v.streaming.load import host_bytes, stream_blocks
from lowvram_i2v.streaming.slab import aligned
from lowvram_i2v.text.llava import SKIPPED_LAYERS
from lowvram_i2v.text.template import TEXT_LENGTH

PREFIX_LENGTH = 103
"""Tokens of the template before the user's text, as the released tokenizer counts them."""

_DECODER = "language_model."
_EMBEDDING = "model.embed_tokens.weight"
_TEXT_SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
_VISION_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32}
"""What a config.json means where it leaves these out: the library's defaults."""


def is_loaded(name: str) -> bool:
    """Whether a parameter of the built LLaVA has to be loaded before `streamed_llava`: those outside the decoder."""
    return not name.startswith(_DECODER)


@contextmanager
def streamed_llava(
    file: SafetensorsFile, llava: Any, *, device: torch.device, dtype: torch.dtype
) -> Iterator[nn.Module]:
    """The LLaVA, ready for any number of calls while a `with` lasts.

    file: `text_encoder.safetensors`. llava: from `build_llava`, linear layers quantized as stored, loaded where
    `is_loaded` says so, all else on the meta device. dtype: what the decoder's floats become.
    Raises CheckpointError if the file has other tensors or is cut, ResourceError for too little RAM.
    """
    decoder = llava.language_model
    layers = {f"model.layers.{number}": layer for number, layer in enumerate(decoder.layers)}
    table = decoder.embed_tokens
    decoder.embed_tokens = EmbeddingRows(file, _EMBEDDING, device, dtype)
    try:
        with (
            stream_blocks(
                file, layers, device=device, dtype=dtype, resident=0, slots=FEWEST_SLOTS, host="mapped"
            ) as stream,
            feed(list(layers.values()), stream),
        ):
            yield llava
    finally:
        decoder.embed_tokens = table


class EmbeddingRows(nn.Module):
    """In place of a token embedding: reads the rows that are asked for, each once a call, from the file.

    The ids are looked at on the host. On a GPU that waits for them, but in the first line of a forward there is nothing
    else to wait for.
    """

    def __init__(self, file: SafetensorsFile, name: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._file, self._name, self._device, self._dtype = file, name, device, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integers -> [..., width] on the device. Raises CheckpointError for an id without a row."""
        asked: list[int] = ids.flatten().tolist()
        places = {number: place for place, number in enumerate(dict.fromkeys(asked))}
        index = torch.tensor([places[number] for number in asked], dtype=torch.int64).view(ids.shape)
        return self._read(list(places))[index].to(self._device).to(self._dtype)

    def _read(self, ids: list[int]) -> Tensor:
        """Rows [ids, width] as stored, on the CPU."""
        count, width = self._file.entries[self._name].shape
        if strange := [number for number in ids if not 0 <= number < count]:
            raise CheckpointError(
                f"the tokenizer knows a token {strange[-1]}; {self._file.path} has {count} in {self._name}",
                "Take the tokenizer that was released with the text encoder.",
            )
        entry = self._file.entries[self._name]
        rows = torch.empty(len(ids), width, dtype=getattr(torch, TORCH_DTYPES[entry.dtype]))
        target = rows.view(torch.uint8).numpy()
        with self._file.path.open("rb") as file:
            for row, number in zip(target, ids, strict=True):
                file.seek(entry.start + number * row.nbytes)
                if file.readinto(row.data) != row.nbytes:
                    raise CheckpointError(f"{self._file.path} ends inside {self._name}", "Copy or convert it again.")
        return rows


def longest_prompt(config: dict[str, Any], image_row_stride: int) -> int:
    """Rows of the longest encoded prompt with its picture. config: the LLaVA's config.json."""
    return len(range(0, _image_rows(config), image_row_stride)) + TEXT_LENGTH


def text_bytes(config: dict[str, Any], file: Mapping[str, int], element: int) -> tuple[int, int]:
    """Peak bytes while prompts of any length are encoded by the streamed LLaVA: (video memory, RAM).

    config: its config.json. file: tensor name -> bytes in the file. element: bytes of a value that is computed with.
    Video memory is that of weights, slots and activations; what libraries keep for themselves is not in it. The peak is
    in a decoder layer's MLP, if that is at least twice as wide inside, as in every LLaMA.
    """
    text, vision = _TEXT_SIZES | config["text_config"], _VISION_SIZES | config["vision_config"]
    width, inner = text["hidden_size"], text["intermediate_size"]
    images, tokens = _image_rows(config), PREFIX_LENGTH + TEXT_LENGTH - 1 + _image_rows(config)
    # embeddings, the layer's input, the residual and its norm; the picture's rows twice, from the vision tower's
    values = 4 * tokens * width + 2 * images * width + (images + 1) * vision["hidden_size"]
    rotary = 2 * tokens * (text.get("head_dim") or width // text["num_attention_heads"])
    pixels = 4 * 3 * vision["image_size"] ** 2
    mlp = _mlp_bytes(_scheme(file, inner, width), width, inner, tokens, element)

    loaded, slabs = weight_bytes(config, file, element)
    places = streamed_places(len(slabs), 0, FEWEST_SLOTS)
    slots = FEWEST_SLOTS * max(slabs) if places else sum(slabs)
    return loaded + slots + (values + rotary) * element + pixels + mlp, host_bytes(slabs, places, "mapped")


def weight_bytes(config: dict[str, Any], file: Mapping[str, int], element: int) -> tuple[int, list[int]]:
    """Bytes of what `is_loaded`, and of each decoder layer's slab. Arguments as of `text_bytes`."""
    text = _TEXT_SIZES | config["text_config"]
    stored = file["model.layers.0.input_layernorm.weight"] // text["hidden_size"]
    layers = [f"model.layers.{number}." for number in range(text["num_hidden_layers"] - SKIPPED_LAYERS)]
    loaded = sum(size for name, size in file.items() if _is_loaded_from(name, config))
    return loaded // stored * element, [_slab_bytes(file, layer, stored, element) for layer in layers]


def _mlp_bytes(scheme: str | None, width: int, inner: int, tokens: int, element: int) -> int:
    """The most that exists at a time of gate, its activation, up, their product, down, and the dequantized weights."""
    row = tokens * element
    up = scratch(scheme, "w8a16", (inner, width), tokens, element)
    down = scratch(scheme, "w8a16", (width, inner), tokens, element)
    return max(
        3 * inner * row,
        2 * inner * row + up.held,
        inner * row + up.held + up.call,
        inner * row + down.held + max(down.call, width * row),
    )


def _slab_bytes(file: Mapping[str, int], layer: str, stored: int, element: int) -> int:
    """Length of a decoder layer's slab: quantized weights as they are, all else in values of `element` bytes."""
    names = [name for name in file if name.startswith(layer) and not is_marker(name)]
    quantized = {name.rpartition(".")[0] for name in names if not name.endswith((".weight", ".bias"))}
    return sum(
        aligned(file[name] if name.rpartition(".")[0] in quantized else file[name] // stored * element)
        for name in names
    )


def _scheme(file: Mapping[str, int], out: int, into: int) -> str | None:
    """How the first layer's gate projection, a weight [out, into], is stored; None for plain floats."""
    layer = "model.layers.0.mlp.gate_proj."
    for scheme in SCHEMES.values():
        parts = {
            suffix: torch.Size(shape).numel() * dtype.itemsize
            for suffix, (shape, dtype) in scheme.parts(out, into).items()
        }
        if all(file.get(layer + suffix) == size for suffix, size in parts.items()):
            return scheme.name
    return None


def _is_loaded_from(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor of the file is part of the vision tower as built, or of the projector."""
    if found := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name):
        layers: int = (_VISION_SIZES | config["vision_config"])["num_hidden_layers"]
        feature: int = config.get("vision_feature_layer", -2)
        return int(found[1]) < (feature if feature >= 0 else layers + 1 + feature)
    return not name.startswith("model.") and not is_marker(name)


def _image_rows(config: dict[str, Any]) -> int:
    """`llava.image_rows` of a config.json."""
    vision = _VISION_SIZES | config["vision_config"]
    return int(vision["image_size"] // vision["patch_size"]) ** 2
