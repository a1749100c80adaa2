"""What the text phase hands to the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """One encoded prompt, without padding and without a batch axis.

    prompt_embeds: [tokens, text_dim], image rows first, then text rows.
    pooled_prompt_embeds: [pooled_dim].
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
