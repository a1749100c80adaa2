"""8-bit attention of the SageAttention package, where it is installed."""

from __future__ import annotations

from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim]."""
    from sageattention import sageattn  # type: ignore[import-not-found]

    q, k, v = (x[None] for x in (q, k.clone(), v))  # it subtracts the mean of k in place
    result: Tensor = sageattn(q, k, v, tensor_layout="NHD")
    return result[0]
