"""A prediction in token chunks over a workspace: the blocks of `dit/blocks.py`, the same arithmetic, little memory.

Everything but attention looks at one token at a time, so a block is three sweeps over chunks of tokens:

    1  norm and modulate, q k v product, norm and rotate          x -> q, k, v
    2  attention, a group of heads at a time                      q, k, v -> q
    3  projection, gate, and the MLP                              q, x -> x

A layer's weight is made ready (`opened`) once a sweep and serves all its chunks. A single block's first linear layer is
used in two parts: the rows that make q, k, v in sweep 1, those of the MLP in sweep 3, where the norm is computed again.

Between layers, `Rows` are in the form that the next layer multiplies: in the activations' dtype (w8a16), or as 8-bit
codes with a scale each (w8a8), made in the same pass as what comes before them (norm and modulate, GELU). The steps of
`Prediction` make either; the way through a block is one.

Invariants: x and q are changed in place; a chunk's temporaries are gone before the next chunk begins, and their peak is
what `workspace.activation_bytes` says; nothing waits for the device; the result depends on the chunks' size by rounding
only. No autograd. The ops are those of the workspace's table, so that fused kernels can take their places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from lowvram_i2v.attention import AttentionBackend, attend_over
from lowvram_i2v.dit.blocks import DoubleBlock, HeadNorm, Rope, SingleBlock
from lowvram_i2v.dit.conditioning import StreamModulation
from lowvram_i2v.dit.embedders import Mlp, PatchEmbedder
from lowvram_i2v.dit.workspace import Workspace
from lowvram_i2v.kernels.ops import Ops
from lowvram_i2v.kernels.quant_linear import Opened, opened
from lowvram_i2v.kernels.w8a8 import Codes

OPS = (
    "layer_norm_modulate",
    "gated_residual_",
    "qkv_norm_rope",
    "gelu",
    "row_codes",
    "layer_norm_modulate_codes",
    "gelu_codes",
    "linear",
    "linear_gated_residual_",
)
"""The ops of the table that are used here: what has to be trusted on a card."""

Rows = Tensor | Codes
"""[rows, width], as the layer multiplies them that reads them next."""


@dataclass(frozen=True)
class Chunk:
    """A range of tokens: how many of them belong to the first frame, and the rotary table of those in the image."""

    rows: slice
    first_tokens: int
    rope: Rope


@dataclass(frozen=True)
class Prediction:
    """One pass through all blocks: a workspace's buffers at this prompt's length, and what no block changes.

    x [tokens, hidden]; q, k, v [tokens, heads, dim]; the first `image_tokens` of them are the image's. The methods are
    the steps of a chunk; `reader` is the layer that multiplies the rows that a step makes.
    """

    work: Workspace
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    image_tokens: int
    first_tokens: int
    rope: Rope
    attend: AttentionBackend
    ops: Ops

    def chunks(self, tokens: range) -> Iterator[Chunk]:
        """Consecutive chunks that cover the tokens."""
        cos, sin = self.rope
        for start in range(tokens.start, tokens.stop, self.work.chunking.rows):
            stop = min(start + self.work.chunking.rows, tokens.stop)
            first_tokens = min(max(self.first_tokens - start, 0), stop - start)
            yield Chunk(slice(start, stop), first_tokens, (cos[start:stop], sin[start:stop]))

    def normed(self, chunk: Chunk, shift: Tensor, scale: Tensor, reader: Opened) -> Rows:
        """The chunk of x, normed and modulated."""
        x = self.x[chunk.rows]
        if reader.codes is not None:
            return self.ops.layer_norm_modulate_codes(x, shift, scale, chunk.first_tokens, reader.codes)
        out = torch.empty_like(x)
        self.ops.layer_norm_modulate(x, shift, scale, chunk.first_tokens, out)
        return out

    def attended(self, chunk: Chunk, reader: Opened) -> Rows:
        """The chunk's result of attention."""
        attended = self.q[chunk.rows].flatten(1)
        return attended if reader.codes is None else self.ops.row_codes(attended, reader.codes)

    def product(self, layer: Opened, rows: Rows) -> Tensor:
        """layer(rows)."""
        return layer(rows) if isinstance(rows, Tensor) else self.ops.linear(rows, layer.stored, layer.dtype)

    def activated(self, layer: Opened, rows: Rows, reader: Opened) -> Rows:
        """GELU(layer(rows))."""
        inner = self.product(layer, rows)
        if reader.codes is not None:
            return self.ops.gelu_codes(inner, reader.codes, None)
        self.ops.gelu(inner, inner)
        return inner

    def joint(self, chunk: Chunk, layer: Opened, rows: Rows, reader: Opened) -> Rows:
        """The chunk's result of attention and, beside it, GELU(layer(rows))."""
        attended, inner = self.q[chunk.rows].flatten(1), self.product(layer, rows)
        if reader.codes is not None:
            return self.ops.gelu_codes(inner, reader.codes, attended)
        hidden = attended.shape[1]
        out = inner.new_empty(len(inner), hidden + inner.shape[1])
        out[:, :hidden] = attended
        self.ops.gelu(inner, out[:, hidden:])
        return out

    def add(self, chunk: Chunk, layer: Opened, rows: Rows, gate: Tensor) -> None:
        """x += gate * layer(rows)."""
        x = self.x[chunk.rows]
        if isinstance(rows, Tensor):
            self.ops.gated_residual_(x, layer(rows), gate, chunk.first_tokens)
        else:
            self.ops.linear_gated_residual_(x, rows, layer.stored, gate, chunk.first_tokens)


def begin(
    work: Workspace,
    embedder: PatchEmbedder,
    latents: Tensor,
    txt: Tensor,
    first_tokens: int,
    rope: Rope,
    attend: AttentionBackend,
) -> Prediction:
    """Fills x: latents [channels, T, H, W] through the patch embedder, a frame at a time, then txt [tokens, hidden]."""
    proj, image_tokens = embedder.proj, len(rope[0])
    assert proj.bias is not None
    tokens = image_tokens + len(txt)
    if tokens > len(work.x):
        raise ValueError(f"{tokens} tokens in a workspace for {len(work.x)}")
    x, q, k, v = (buffer[:tokens] for buffer in (work.x, work.q, work.k, work.v))
    pt, ph, pw = proj.kernel_size
    frames = torch.split(latents, pt, dim=1)
    for frame, rows in zip(frames, x[:image_tokens].chunk(len(frames)), strict=True):
        patches = rearrange(frame.to(work.dtype), "c t (h ph) (w pw) -> (h w) (c t ph pw)", ph=ph, pw=pw)
        torch.addmm(proj.bias, patches, proj.weight.flatten(1).T, out=rows)
    x[image_tokens:] = txt
    return Prediction(work, x, q, k, v, image_tokens, first_tokens, rope, attend, work.ops)


def double_block(block: DoubleBlock, run: Prediction, modulation: tuple[StreamModulation, StreamModulation]) -> None:
    """x, one block later."""
    img, txt = range(run.image_tokens), range(run.image_tokens, len(run.x))
    img_mod, txt_mod = modulation
    img_norms = block.img_attn_q_norm, block.img_attn_k_norm
    txt_norms = block.txt_attn_q_norm, block.txt_attn_k_norm
    _project(run, img, block.img_attn_qkv, img_norms, (img_mod.shift1, img_mod.scale1))
    _project(run, txt, block.txt_attn_qkv, txt_norms, (txt_mod.shift1, txt_mod.scale1))
    _attend(run)
    _finish_double(run, img, block.img_attn_proj, block.img_mlp, img_mod)
    _finish_double(run, txt, block.txt_attn_proj, block.txt_mlp, txt_mod)


def single_block(block: SingleBlock, run: Prediction, modulation: tuple[Tensor, ...]) -> None:
    """x, one block later."""
    shift, scale, gate = modulation
    hidden, dtype, whole = block.hidden, run.work.dtype, range(len(run.x))
    _project(run, whole, block.linear1, (block.q_norm, block.k_norm), (shift, scale))
    _attend(run)
    linear1 = opened(block.linear1, dtype, slice(3 * hidden, block.linear1.out_features))
    linear2 = opened(block.linear2, dtype)
    for chunk in run.chunks(whole):
        joint = run.joint(chunk, linear1, run.normed(chunk, shift, scale, linear1), linear2)
        run.add(chunk, linear2, joint, gate)
        del joint


def final_layer(linear: nn.Linear, run: Prediction, modulation: tuple[Tensor, ...]) -> Tensor:
    """Image tokens of x -> the values of their patches [image tokens, channels * patch], float32."""
    shift, scale = modulation
    values = opened(linear, run.work.dtype)
    out = torch.empty(run.image_tokens, linear.out_features, device=run.x.device, dtype=torch.float32)
    for chunk in run.chunks(range(run.image_tokens)):
        out[chunk.rows] = run.product(values, run.normed(replace(chunk, first_tokens=0), shift, scale, values))
    return out


def _project(
    run: Prediction,
    tokens: range,
    layer: nn.Module,
    head_norms: tuple[HeadNorm, HeadNorm],
    modulation: tuple[Tensor, Tensor],
) -> None:
    """Sweep 1: q, k, v of the tokens. The layer's first 3 * hidden output features make them."""
    qkv = opened(layer, run.work.dtype, slice(0, 3 * run.x.shape[1]))
    q_weight, k_weight = (norm.weight.float() for norm in head_norms)
    for chunk in run.chunks(tokens):
        q, k, v = (x[chunk.rows] for x in (run.q, run.k, run.v))
        made = run.product(qkv, run.normed(chunk, *modulation, qkv))
        run.ops.qkv_norm_rope(made, q_weight, k_weight, chunk.rope, q, k, v)
        del made


def _attend(run: Prediction) -> None:
    """Sweep 2: the result takes the place of q, which no other head reads."""
    groups = (torch.split(x, run.work.chunking.heads, dim=1) for x in (run.q, run.k, run.v))
    for q, k, v in zip(*groups, strict=True):
        attend_over(run.attend, q, k, v)


def _finish_double(
    run: Prediction, tokens: range, projection: nn.Module, mlp: Mlp, modulation: StreamModulation
) -> None:
    """Sweep 3 of a double block: both residuals of the tokens."""
    proj, fc1, fc2 = (opened(layer, run.work.dtype) for layer in (projection, mlp.fc1, mlp.fc2))
    for chunk in run.chunks(tokens):
        run.add(chunk, proj, run.attended(chunk, proj), modulation.gate1)
        inner = run.activated(fc1, run.normed(chunk, modulation.shift2, modulation.scale2, fc1), fc2)
        run.add(chunk, fc2, inner, modulation.gate2)
        del inner
