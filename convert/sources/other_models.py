"""What a file is that is not this transformer: said in words, so that nobody has to guess.

Two tables of tensor names: relatives whose files look like ours, and other models. A name counts as a whole or, where
it ends in a dot, as a beginning. First hit wins, so the more telling rows come first. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection

RELATIVES = (
    (("clean_x_embedder.proj.weight",), "FramePack: HunyuanVideo trained further for another kind of conditioning"),
    (("byt5_in.", "vision_in.", "cond_type_embedding.", "cond_type_embed."), "HunyuanVideo-1.5, another model"),
    (("context_embedder_2.", "image_embedder."), "HunyuanVideo-1.5, another model, in diffusers names"),
    (
        ("double_blocks.0.img_attn_q.", "single_blocks.0.linear1_attn_q."),
        "split as Wan2GP has it in memory: no released file of HunyuanVideo-I2V looks like this",
    ),
    (("audio_proj.", "audio_adapter.", "ref_in."), "HunyuanVideo-Avatar, another model"),
)
OTHERS = (
    (
        ("img_in.weight", "guidance_in.in_layer.weight", "double_blocks.0.img_attn.qkv.weight"),
        "a Flux-like transformer",
    ),
    (("single_transformer_blocks.0.proj_mlp.weight",), "a Flux-like transformer in diffusers names"),
    (("patch_embedding.weight", "head.modulation", "blocks.0.self_attn.q.weight"), "a Wan transformer"),
    (("condition_embedder.time_proj.",), "a Wan transformer in diffusers names"),
    (("patchify_proj.weight", "transformer_blocks.0.scale_shift_table"), "an LTX-Video transformer"),
    (("joint_blocks.0.x_block.attn.qkv.weight",), "a Stable Diffusion 3 transformer"),
    (("transformer_blocks.0.img_mod.1.weight",), "a Qwen-Image transformer"),
    (("input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"), "a Stable Diffusion U-Net"),
    (("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "a Stable Diffusion U-Net in diffusers names"),
    (("transformer_blocks.0.norm1.linear.weight", "patch_embed.proj.weight"), "a CogVideoX transformer"),
    (("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"), "a language model"),
)
ADAPTERS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", ".hada_w1_a", ".lokr_w1")


def relative(names: Collection[str]) -> str | None:
    """Which relative of the transformer these tensors are, None if they are none that is known."""
    return _first(RELATIVES, names)


def other_model(names: Collection[str], prefixes: Collection[str]) -> str | None:
    """What else these tensors are, None if that is not known. prefixes: such as names may start with."""
    if any(mark in f"{name}." for name in names for mark in ADAPTERS):
        return "a LoRA, which belongs on top of a model"
    for prefix in prefixes:
        bare = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if found := _first(OTHERS, bare):
            return found
    return None


def _first(table: tuple[tuple[tuple[str, ...], str], ...], names: Collection[str]) -> str | None:
    known, begins = set(names), tuple(mark for marks, _ in table for mark in marks if mark.endswith("."))
    present = {mark for mark in begins if any(name.startswith(mark) for name in names)}
    return next((text for marks, text in table if any(mark in known or mark in present for mark in marks)), None)
