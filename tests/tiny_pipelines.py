"""Make small random diffusion pipelines with the reference, as folders on disk.

The three families differ here as they do in the published files: projections, heads, contexts,
text encoders, activation, which hidden state is used, tokenizer padding, scheduler.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from traced import untraced

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # of a UNet, in every family

START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = (
    Path(__file__).resolve().parents[1]
    / "src/diptych/weights/embedded/clip_tokenizer/bpe_simple_vocab_16e6.txt.gz"
)
_FULL, _SMALL = 49152 - 256 - 2, 600  # merges

# As in the published scheduler_config.json of each family.
_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": (
        "PNDMScheduler",
        {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "sd2": (
        "DDIMScheduler",
        {
            **_BETAS,
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    ),
    "sdxl": (
        "EulerDiscreteScheduler",
        {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1},
    ),
}

_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 32, 32, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sd2": {
        "block_out_channels": (32, 32, 32, 64),
        "cross_attention_dim": 48,
        "attention_head_dim": (1, 1, 1, 1),
        "use_linear_projection": True,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "block_out_channels": (32, 32, 64),
        "cross_attention_dim": 80,
        "attention_head_dim": (1, 1, 1),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
_TEXTS: dict[str, tuple[dict[str, Any], ...]] = {
    "sd1": ({"hidden_size": 32, "hidden_act": "quick_gelu"},),
    "sd2": ({"hidden_size": 48, "hidden_act": "gelu"},),
    "sdxl": (
        {"hidden_size": 32, "hidden_act": "quick_gelu"},
        {"hidden_size": 48, "hidden_act": "gelu", "projection_dim": 40},
    ),
}


@untraced()
def make_pipeline(
    folder: Path,
    family: Family,
    seed: int,
    in_channels: int = 4,
    scheduler: Any = None,
    *,
    full_vocabulary: bool = False,
    sample_size: int = 8,
    save: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Save a random pipeline of `family` to `folder` and return it.

    `scheduler` is a scheduler of diffusers, a pair (class name, config), or None for the family's
    own. With `full_vocabulary`, it has the 49408 words that a single file stands for. `changes`
    go to the config of the UNet; `save` to `save_pretrained`.
    """
    import diffusers
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(full_vocabulary)
    texts = [_text_encoder(family, index, tokenizer) for index in range(len(_TEXTS[family]))]
    unet_config = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        **_UNETS[family],
        **changes,
    }
    unet = UNet2DConditionModel(**unet_config)
    vae = AutoencoderKL(
        sample_size=8 * sample_size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )
    for module in (*texts, unet, vae):
        _enliven(module)
    parts: dict[str, Any] = {
        "text_encoder": texts[0],
        "tokenizer": tokenizer,
        "unet": unet,
        "vae": vae,
        "scheduler": _scheduler(diffusers, family if scheduler is None else scheduler),
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": texts[1], "tokenizer_2": make_tokenizer(full_vocabulary, "!")}
        inpaints = diffusers.StableDiffusionXLInpaintPipeline
        kind = inpaints if in_channels == 9 else diffusers.StableDiffusionXLPipeline
        pipeline = kind(**parts)
    else:
        if family == "sd2":
            parts["tokenizer"] = make_tokenizer(full_vocabulary, "!")
        parts |= {"safety_checker": None, "feature_extractor": None}
        inpaints = diffusers.StableDiffusionInpaintPipeline
        kind = inpaints if in_channels == 9 else diffusers.StableDiffusionPipeline
        pipeline = kind(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, **(save or {}))
    return pipeline


def write_lora(path: Path, seed: int, width: int) -> Path:
    """Write a random LoRA of rank 2 for the one layer `LAYER` of `width` numbers, as peft does."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    down = torch.randn(2, width, generator=random)
    up = torch.randn(width, 2, generator=random)
    named = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    save_file(named, path)
    return path


def make_tokenizer(full_vocabulary: bool = False, pad_token: str = END) -> Any:
    """Return a `CLIPTokenizer` whose merges are the first of OpenAI's."""
    from transformers import CLIPTokenizer

    merges = [
        tuple(line.split()) for line in _lines()[1 : 1 + (_FULL if full_vocabulary else _SMALL)]
    ]
    letters = list(_alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(pair) for pair in merges] + [START, END]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77, errors="replace"
    )


def _text_encoder(family: Family, index: int, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "max_position_embeddings": 77,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 1,
            **_TEXTS[family][index],
        }
    )
    return (CLIPTextModelWithProjection if index else CLIPTextModel)(config).eval()


def _scheduler(diffusers: Any, wanted: Any) -> Any:
    if isinstance(wanted, str):
        wanted = _SCHEDULERS[wanted]
    if isinstance(wanted, tuple):
        name, config = wanted
        return getattr(diffusers, name)(**config)
    return wanted


def _enliven(module: Any) -> None:
    """Make every parameter matter: norms and biases not 1 and 0, embeddings that differ."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "embedding.weight" in name:
                parameter.normal_(std=0.5)
            elif "text_model" in name or "self_attn" in name or "mlp" in name:
                parameter.normal_(std=0.15)
    module.eval().requires_grad_(False)


@cache
def _lines() -> list[str]:
    return gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")


@cache
def _alphabet() -> tuple[str, ...]:
    """Return the 256 letters that stand for bytes, printable ones first, as CLIP orders them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return (*map(chr, printable), *(chr(256 + number) for number in range(len(others))))


def count_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def write_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
