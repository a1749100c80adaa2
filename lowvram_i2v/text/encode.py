"""Runs the two text encoders on one prompt and one picture.

Invariants: one sequence of real tokens, positions 0, 1, 2, ..., causal, no mask; each encoder has its own
function, so that they can be loaded one after the other. The prompt is taken as given: stripping it is the
request's business, and so are the negative prompt and the picture that goes with it (`black_image`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.text.embeds import PromptEmbeds
from lowvram_i2v.text.llava import image_rows
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def encode_prompt(
    llava: Any,
    llava_tokenizer: LlavaTokenizer,
    clip: Any,
    clip_tokenizer: ClipTokenizer,
    prompt: str,
    image: Image.Image,
    image_row_stride: int,
) -> PromptEmbeds:
    """Both encoders, for callers that hold both in memory."""
    return PromptEmbeds(
        prompt_rows(llava, llava_tokenizer, prompt, image, image_row_stride),
        pooled_vector(clip, clip_tokenizer, prompt),
    )


@torch.no_grad()
def prompt_rows(llava: Any, tokenizer: LlavaTokenizer, prompt: str, image: Image.Image, stride: int) -> Tensor:
    """[tokens, text_dim] on the model's device: every `stride`-th image row, then the text rows.

    llava: from `build_llava`, weights loaded. image: the whole picture, not the crop that becomes the first
    frame. Raises CheckpointError if tokenizer and model disagree about the image's token id.
    """
    count = image_rows(llava.config)
    if tokenizer.image_id != llava.config.image_token_id:
        raise CheckpointError(
            f"the tokenizer's image id is {tokenizer.image_id}, the model's {llava.config.image_token_id}",
            "Take the tokenizer that was released with the text encoder.",
        )
    tokens = tokenizer.encode(prompt)
    first = tokens.image_index
    ids = (*tokens.ids[:first], *[tokenizer.image_id] * count, *tokens.ids[first + 1 :])
    rows = [*range(first, first + count, stride), *(row + count - 1 for row in tokens.text_rows)]
    hidden: Tensor = llava(
        input_ids=torch.tensor([ids], device=llava.device),
        pixel_values=vision_pixels(image, llava.config.vision_config.image_size)[None].to(llava.device),
        use_cache=False,
    ).last_hidden_state[0]
    return hidden[torch.tensor(rows, device=hidden.device)]


@torch.no_grad()
def pooled_vector(clip: Any, tokenizer: ClipTokenizer, prompt: str) -> Tensor:
    """[pooled_dim] on the model's device: the final-norm state of the end token.

    The reference pads to 77 with further end tokens and reads the first; in a causal model that is the same
    number.
    """
    ids, _ = tokenizer.encode(prompt)
    state: Tensor = clip(input_ids=torch.tensor([ids], device=clip.device)).last_hidden_state
    return state[0, -1]


def vision_pixels(image: Image.Image, size: int) -> Tensor:
    """[3, size, size] float32: short side to `size`, centre crop, CLIP's normalisation."""
    values = square_crop(image, size) * (1 / 255)
    pixels = (values.astype(np.float32) - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def square_crop(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[size, size, 3] uint8: the picture that the vision tower sees (bicubic, centred)."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def black_image(like: Image.Image) -> Image.Image:
    """The picture that goes with a negative prompt: black, of the same size."""
    return Image.new("RGB", like.size)
