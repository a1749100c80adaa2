"""A transformer's blocks quantized where they are, as a converted file would hold them."""

from __future__ import annotations

from torch import nn

from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.kernels.quant_linear import swap_linears
from lowvram_i2v.kernels.scheme import SCHEMES


def quantize_blocks(model: HunyuanVideoTransformer, scheme: str) -> None:
    """Takes the place of every linear layer that a step uses in a block, on the layer's own device."""
    plain = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and is_in_block(name) and not is_conditioning(name)
    }
    swap_linears(model, lambda name: SCHEMES[scheme] if name in plain else None)
    for name, layer in plain.items():
        state = SCHEMES[scheme].quantize(layer.weight.detach(), name)
        model.get_submodule(name).load_state_dict({**state, "bias": layer.bias.detach()}, assign=True)
    model.eval().requires_grad_(False)
