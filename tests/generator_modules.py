"""Tiny generators of random modules, as a checkpoint would be described."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.text_to_image.schedules import ScheduleConfig
from diptych.weights.diffusion import GeneratorFolder
from diptych.weights.generator_files import TokenizerFiles
from diptych.weights.save_generator import describe_configs
from diptych.weights.tokenizer_files import CLIP_MERGES

FAMILIES = ("diptych", "sdxl")


def make_modules(family: str) -> dict[str, nn.Module]:
    torch.manual_seed(2)
    text = dataclasses.replace(
        ClipTextConfig.tiny(), vocab_size=49408, eos_token_id=49407, max_position_embeddings=77
    )
    unet = UNetConfig.tiny()
    made: dict[str, nn.Module] = {}
    if family == "sdxl":
        text = dataclasses.replace(text, output_layer=-2, output_norm=False)
        second = dataclasses.replace(text, hidden_act="gelu", projection_dim=24)
        made = {"text_encoder_2": ClipText(second)}
        unet = dataclasses.replace(
            unet,
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
    made = {
        "text_encoder": ClipText(text),
        **made,
        "unet": UNet(unet),
        "vae": Vae(VaeConfig.tiny()),
    }
    return {name: module.eval() for name, module in made.items()}


def make_model(modules: dict[str, nn.Module], family: str) -> GeneratorFolder:
    texts = [name for name in modules if name.startswith("text_encoder")]
    tokenizers = {
        name.replace("encoder", "x").replace("text_x", "tokenizer"): TokenizerFiles(CLIP_MERGES)
        for name in texts
    }
    return GeneratorFolder(
        path=Path(),
        name="mine",
        revision=None,
        family=family,
        configs=describe_configs(modules),
        schedule=dataclasses.asdict(ScheduleConfig()),
        tokenizers=tokenizers,
        weights={},
        layout="diffusers",
        networks={},
        precision=None,
        defaults={"num_inference_steps": 12},
        force_zeros_for_empty_prompt=family == "sdxl",
    )
