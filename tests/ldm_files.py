"""Write a pipeline of diffusers as the single file of its family, by rules of its own.

This is the other side of the tables in `weights/dialects`, written down independently: what the
original programs call a tensor, told from its name in diffusers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, layers: int, attention_up: list[bool]) -> str:
    """`layers` a level on the way down; `attention_up` by up block, as they run."""
    path, leaf = name.rsplit(".", 1)
    if path in _UNET_ENDS:
        return f"{_UNET_ENDS[path]}.{leaf}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", path):
        block = 1 + int(found[1]) * (layers + 1) + int(found[2])
        return f"input_blocks.{block}.0.{_RES[found[3]]}.{leaf}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", path):
        block = 1 + int(found[1]) * (layers + 1) + int(found[2])
        return f"input_blocks.{block}.1.{found[3]}.{leaf}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{leaf}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)", path):
        return f"middle_block.{2 * int(found[1])}.{_RES[found[2]]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", path):
        return f"middle_block.1.{found[1]}.{leaf}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", path):
        block = int(found[1]) * (layers + 1) + int(found[2])
        return f"output_blocks.{block}.0.{_RES[found[3]]}.{leaf}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", path):
        block = int(found[1]) * (layers + 1) + int(found[2])
        return f"output_blocks.{block}.1.{found[3]}.{leaf}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
        level = int(found[1])
        block = level * (layers + 1) + layers
        return f"output_blocks.{block}.{2 if attention_up[level] else 1}.conv.{leaf}"
    raise KeyError(name)


def vae_name(name: str, levels: int) -> str:
    path, leaf = name.rsplit(".", 1)
    if path in ("quant_conv", "post_quant_conv"):
        return name
    half, rest = path.split(".", 1)
    ends = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
    if rest in ends:
        return f"{half}.{ends[rest]}.{leaf}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"down_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", rest):
        return f"{half}.down.{found[1]}.block.{found[2]}.{found[3]}.{leaf}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", rest):
        return f"{half}.down.{found[1]}.downsample.conv.{leaf}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", rest):
        return f"{half}.up.{levels - 1 - int(found[1])}.block.{found[2]}.{found[3]}.{leaf}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", rest):
        return f"{half}.up.{levels - 1 - int(found[1])}.upsample.conv.{leaf}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)", rest):
        return f"{half}.mid.block_{int(found[1]) + 1}.{found[2]}.{leaf}"
    inner = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    return f"{half}.mid.attn_1.{inner[rest.removeprefix('mid_block.attentions.0.')]}.{leaf}"


def write_unet(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    attention_up = ["CrossAttn" in kind for kind in config.up_block_types]
    layers = config.layers_per_block
    return {unet_name(name, layers, attention_up): tensor for name, tensor in state.items()}


def write_vae(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        is_matrix = tensor.ndim == 2  # of the attention, which was made of 1x1 convolutions
        found[vae_name(name, len(config.block_out_channels))] = (
            tensor[:, :, None, None] if is_matrix else tensor
        )
    return found


def write_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()}


def write_openclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T.contiguous()
    for layer in range(sum(name.endswith("layer_norm1.bias") for name in state)):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            three = [state[f"{ours}.self_attn.{word}_proj.{leaf}"] for word in "qkv"]
            found[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(three)
            for file, module in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                found[f"{theirs}.{file}.{leaf}"] = state[f"{ours}.{module}.{leaf}"]
    return found


def single_file(pipeline: Any, family: str) -> dict[str, Tensor]:
    """Return the tensors of a single file, with all that published ones carry besides."""
    found: dict[str, Tensor] = {}

    def add(prefix: str, tensors: dict[str, Tensor]) -> None:
        found.update({prefix + name: tensor for name, tensor in tensors.items()})

    add("model.diffusion_model.", write_unet(pipeline.unet.state_dict(), pipeline.unet.config))
    add("first_stage_model.", write_vae(pipeline.vae.state_dict(), pipeline.vae.config))
    text = pipeline.text_encoder.state_dict()
    if family == "sd1":
        add("cond_stage_model.transformer.", write_clip(text))
        positions = torch.arange(77)[None]
        add("cond_stage_model.transformer.text_model.", {"embeddings.position_ids": positions})
    elif family == "sd2":
        tower = write_openclip(text)
        last = 1 + max(int(n.split(".")[2]) for n in tower if n.startswith("transformer."))
        # The last layer of the published tower is not run; it comes with its projection.
        spare = {
            name.replace("resblocks.0.", f"resblocks.{last}."): torch.randn_like(tensor)
            for name, tensor in tower.items()
            if name.startswith("transformer.resblocks.0.")
        }
        width = tower["ln_final.bias"].shape[0]
        others = {"text_projection": torch.randn(width, width), "logit_scale": torch.tensor(4.6)}
        add("cond_stage_model.model.", {**tower, **spare, **others})
    else:
        add("conditioner.embedders.0.transformer.", write_clip(text))
        tower = write_openclip(pipeline.text_encoder_2.state_dict())
        add("conditioner.embedders.1.model.", {**tower, "logit_scale": torch.tensor(4.6)})
    if family != "sdxl":
        for name in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"):
            found[name] = torch.rand(1000)
        found["model_ema.decay"] = torch.tensor(0.9999)
        found["model_ema.num_updates"] = torch.tensor(5)
        found["model_ema.diffusion_modelout2bias"] = torch.randn(4)
    found["first_stage_model.loss.logvar"] = torch.zeros(())
    return found


def write_single_file(pipeline: Any, family: str, path: Path, **extra: Tensor) -> Path:
    """Write it as `.safetensors`, or as the `.ckpt` that a training run leaves."""
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in single_file(pipeline, family).items()} | extra
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(
            {"epoch": 3, "global_step": 470000, "state_dict": tensors, "optimizer_states": []}, path
        )
    return path
