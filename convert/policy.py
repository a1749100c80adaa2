"""What is stored how: one table, scheme -> component -> dtype.

To add a scheme, add a row; a scheme that quantizes wraps the tensors it changes in `stored`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import in_block_order
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError

DTYPES = {
    "bf16": {
        "transformer": torch.bfloat16,
        "text_encoder": torch.float16,
        "text_encoder_2": torch.float16,
        "vae": torch.float16,
    },
    "fp32": dict.fromkeys(("transformer", "text_encoder", "text_encoder_2", "vae"), torch.float32),
}
READABLE = (torch.float32, torch.float16, torch.bfloat16)


def stored(component: str, scheme: str, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a component's file, in the order and dtype in which they are written."""
    dtype = DTYPES[scheme][component]
    return {name: cast(name, tensors[name], dtype) for name in in_block_order(component, tensors)}


def cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The tensor in another floating-point dtype. Reading raises CheckpointError if a value does not fit
    float16."""
    if tensor.dtype == dtype:
        return tensor

    def read() -> Tensor:
        values = tensor.read()
        result = values.to(dtype)
        if dtype == torch.float16 and not result.isfinite().all() and values.isfinite().all():
            raise CheckpointError(
                f"{name} has values up to {values.abs().max():.3g}, float16 holds up to 65504",
                "These are not the released weights, or they are damaged: download them again.",
            )
        return result

    return LazyTensor(tensor.shape, dtype, read)
