"""Stage 2, the two text encoders, by predicting what the prompt says; then they are frozen.

Why not jointly with the transformer: this loss has a right answer that can be checked (100 % of the attributes, in
minutes), so a flow model that ignores its prompt is never the encoders' fault; the frozen rows are computed once for
each clip, not in every step; and they are what inference sees. Binding (which object does what) needs no more: the
transformer attends to the rows of single words, and the attributes are asked for object by object.

The pooled vector and the closing row must each say all attributes; the picture's rows together must say the
picture in 8 x 8 pixels. The heads that read them are thrown away. Batches are padded at the end: both models are
causal, so what is padded changes nothing before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes
from lowvram_i2v.synth.sizes import clip_json, llava_json
from lowvram_i2v.synth.weights import random_tensor
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.encode import vision_pixels
from lowvram_i2v.text.llava import build_llava, image_rows, llava_tensor_name
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer
from lowvram_i2v.variant import VARIANTS
from tools.train_demo.clips import Chunk, Clips, Window
from tools.train_demo.loop import Losses, Run, Training, averaged, generators
from tools.train_demo.sizes import Recipe, with_vocabulary
from tools.train_demo.vocabulary import write_clip_tokenizer, write_llava_tokenizer

VARIANT = VARIANTS["token_replace"]
LLAVA_FOLDER, CLIP_FOLDER = "text_encoder_i2v", "text_encoder_2"  # in the work folder as in the released tree
SMALL = 8  # pixels a side of the picture that the rows must know
PICTURE = 5.0  # weight of that loss
EXAMINED = 32  # held-out prompts of each size


@dataclass(frozen=True)
class Encoded:
    """Prompts with their pictures. rows: [n, longest, text_dim], zero beyond `lengths` [n]. pooled: [n, pooled_dim]."""

    rows: Tensor
    lengths: Tensor
    pooled: Tensor


class TextEncoders(nn.Module):
    """Both encoders, batched, with gradients; the tokenizers that were written into the work folder."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.llava_config: dict[str, Any] = json.loads((work / LLAVA_FOLDER / "config.json").read_text())
        self.clip_config: dict[str, Any] = json.loads((work / CLIP_FOLDER / "config.json").read_text())
        self.llava, self.clip = build_llava(self.llava_config), build_clip(self.clip_config)
        self.llava_tokenizer = LlavaTokenizer(work / LLAVA_FOLDER)
        self.clip_tokenizer = ClipTokenizer(work / CLIP_FOLDER)
        self._llava_ids, self._clip_ids = cache(self.llava_tokenizer.encode), cache(self.clip_tokenizer.encode)

    def start(self, seed: int) -> None:
        """Random weights, as of a synthetic checkpoint."""
        self.llava.load_state_dict(
            _named(self.llava, llava_start(self.llava_config, seed), llava_tensor_name), assign=True
        )
        start = _random("text_encoder_2", clip_shapes(self.clip_config["text_config"]), seed)
        self.clip.load_state_dict(_named(self.clip, start, clip_tensor_name), assign=True)

    def rows(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `text.encode.prompt_rows`, for many. pixels: [n, 3, side, side] -> [n, longest, text_dim], lengths."""
        count, tokenizer = image_rows(self.llava.config), self.llava_tokenizer
        encoded = [self._llava_ids(prompt) for prompt in prompts]
        first = encoded[0].image_index
        ids = [[*one.ids[:first], *[tokenizer.image_id] * count, *one.ids[first + 1 :]] for one in encoded]
        pictures = range(first, first + count, VARIANT.image_row_stride)
        wanted = [[*pictures, *(row + count - 1 for row in one.text_rows)] for one in encoded]
        hidden = self.llava(
            input_ids=_padded(ids, pixels.device), pixel_values=pixels, use_cache=False
        ).last_hidden_state
        lengths = torch.tensor([len(rows) for rows in wanted], device=pixels.device)
        index = _padded(wanted, pixels.device)
        rows = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        valid = torch.arange(index.shape[1], device=pixels.device) < lengths[:, None]
        return rows * valid[..., None], lengths

    def pooled(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """As `text.encode.pooled_vector`, for many -> [n, pooled_dim]."""
        ids = [self._clip_ids(prompt)[0] for prompt in prompts]
        states = self.clip(input_ids=_padded(ids, device)).last_hidden_state
        last = torch.tensor([len(one) - 1 for one in ids], device=device)
        return states[torch.arange(len(ids), device=device), last]  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], pictures: Tensor) -> Encoded:
        """pictures: uint8 [n, H, W, 3], on any device."""
        device = next(self.parameters()).device
        rows, lengths = self.rows(prompts, self.pixels(pictures).to(device))
        return Encoded(rows, lengths, self.pooled(prompts, device))

    def pixels(self, pictures: Tensor) -> Tensor:
        """What the vision tower sees, as inference prepares it: [n, 3, size, size] on the CPU."""
        size: int = self.llava_config["vision_config"]["image_size"]
        return torch.stack([vision_pixels(Image.fromarray(picture.cpu().numpy()), size) for picture in pictures])


class WithHeads(nn.Module):
    """The encoders with the heads that their training needs."""

    def __init__(self, encoders: TextEncoders, counts: Sequence[int]) -> None:
        super().__init__()
        self.encoders, self.counts = encoders, list(counts)
        width = encoders.llava_config["text_config"]["hidden_size"]
        pooled = encoders.clip_config["text_config"]["hidden_size"]
        self.kept = len(range(0, image_rows(encoders.llava.config), VARIANT.image_row_stride))
        self.from_row, self.from_pooled = nn.Linear(width, sum(counts)), nn.Linear(pooled, sum(counts))
        self.norm = nn.LayerNorm(width)
        self.from_picture = nn.Linear(self.kept * width, 3 * SMALL * SMALL)

    def losses(self, prompts: Sequence[str], pixels: Tensor, pictures: Tensor, labels: Tensor) -> Losses:
        """pixels: for the vision tower. pictures: [n, 3, SMALL, SMALL] in 0..1. labels: [n, attributes]."""
        rows, lengths = self.encoders.rows(prompts, pixels)
        rows = self.norm(rows)
        last = rows[torch.arange(len(rows), device=rows.device), lengths - 1]
        pooled = self.encoders.pooled(prompts, pixels.device)
        from_row, right_row = self._attributes(self.from_row(last), labels)
        from_pooled, right_pooled = self._attributes(self.from_pooled(pooled), labels)
        drawn = self.from_picture(rows[:, : self.kept].flatten(1))
        picture = F.mse_loss(drawn, pictures.flatten(1))
        total = from_row + from_pooled + PICTURE * picture
        return {"loss": total, "row": right_row, "pooled": right_pooled, "picture": picture}

    def _attributes(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and the share that is right."""
        pieces = list(zip(torch.split(scores, self.counts, dim=1), labels.T, strict=True))
        entropy = sum(F.cross_entropy(piece, label) for piece, label in pieces) / len(pieces)
        right = [(piece.argmax(1) == label).float().mean() for piece, label in pieces]
        return entropy, torch.stack(right).mean()  # type: ignore[return-value]


def prepare(recipe: Recipe, prompts: Sequence[str], work: Path) -> None:
    """Writes tokenizers and config.json of both encoders into the work folder, once."""
    llava, clip = work / LLAVA_FOLDER, work / CLIP_FOLDER
    if (clip / "config.json").is_file():
        return
    ids, rows = write_llava_tokenizer(llava, prompts)
    size = with_vocabulary(recipe.size, rows, write_clip_tokenizer(clip, prompts))
    (llava / "config.json").write_text(json.dumps(llava_json(size, ids), indent=1))
    (clip / "config.json").write_text(json.dumps(clip_json(size), indent=1))


def train(recipe: Recipe, counts: Sequence[int], clips: Clips, run: Run) -> None:
    """counts: values of each attribute."""
    stage = recipe.text
    torch.manual_seed(run.seed)
    encoders = TextEncoders(run.work)
    encoders.start(run.seed)
    training = Training("text", WithHeads(encoders, counts).requires_grad_(True), stage, run)
    model = training.model
    assert isinstance(model, WithHeads)
    prompts: dict[int, list[str]] = {}

    def make(number: int) -> dict[str, Tensor]:
        chunk = clips.get(number)
        prompts[number] = chunk.prompts
        pictures = chunk.frames[:, 0]
        made = {"number": torch.tensor(number), "pixels": encoders.pixels(pictures), "small": _small(pictures)}
        return {key: value.to(run.device) for key, value in (made | {"labels": chunk.labels}).items()}

    window = Window(clips, make, stage.chunk_steps, stage.most_chunks)
    if training.over:
        return
    held_out = [_examined(chunk, encoders, run) for chunk in clips.held_out(min(EXAMINED, recipe.clips_per_chunk))]

    def examine() -> dict[str, float]:
        found = [model.losses(*one) for one in held_out]
        names = ("row", "pooled", "picture")
        return {f"held-out {name}": sum(float(one[name]) for one in found) / len(found) for name in names}

    def losses_of(step: int) -> Losses:
        choices, _ = generators(run, step)
        chunk = window.draw(step, choices)
        index = torch.randint(len(chunk["labels"]), (stage.batch,), generator=choices)
        words = [prompts[int(chunk["number"])][i] for i in index.tolist()]
        index = index.to(run.device)
        return model.losses(words, chunk["pixels"][index], chunk["small"][index], chunk["labels"][index])

    training.run(losses_of, examine)


def _small(pictures: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, SMALL, SMALL] in 0..1."""
    return F.interpolate(pictures.permute(0, 3, 1, 2).float() / 255, size=(SMALL, SMALL), mode="area")


def _examined(chunk: Chunk, encoders: TextEncoders, run: Run) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """What `WithHeads.losses` takes."""
    pictures = chunk.frames[:, 0]
    tensors = (encoders.pixels(pictures), _small(pictures), chunk.labels)
    pixels, small, labels = (value.to(run.device) for value in tensors)
    return chunk.prompts, pixels, small, labels


def load(run: Run) -> TextEncoders:
    """The trained encoders for use."""
    encoders = TextEncoders(run.work)
    encoders.start(run.seed)
    prefix = "encoders."
    trained = {key.removeprefix(prefix): v for key, v in averaged(run.work, "text").items() if key.startswith(prefix)}
    encoders.load_state_dict(trained, strict=False)
    return encoders.to(run.device).eval().requires_grad_(False)


def llava_start(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights under the names of the model folder's file, with the layers that the runtime does not read."""
    return _random("text_encoder", llava_shapes(config), seed)


def _random(component: str, shapes: Shapes, seed: int) -> dict[str, Tensor]:
    cpu = torch.device("cpu")
    return {name: random_tensor(component, name, shape, torch.float32, seed, cpu) for name, shape in shapes.items()}


def _named(module: nn.Module, tensors: dict[str, Tensor], name_of: Any) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensors[name_of(name)]) for name, _ in module.named_parameters()}


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[n, longest], filled up at the end with a row's own last number."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
