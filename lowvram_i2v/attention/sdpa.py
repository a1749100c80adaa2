"""Attention by torch's own scaled_dot_product_attention: exact, on every device, differentiable."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim]. Torch picks flash, cuDNN or math."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
