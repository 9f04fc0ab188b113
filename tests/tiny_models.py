"""Make small random checkpoints with the reference, as files on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from traced import untraced

END_OF_TEXT = "<|endoftext|>"
CORPUS = [
    "a man riding a wave on top of a surfboard",
    "a cat laying on a blanket next to a dog",
    "two birds are standing next to each other in the snow",
    "a red bus is parked next to a tall building with many windows",
    "people walking down a street holding umbrellas",
    "a plate of food with broccoli and meat on a wooden table",
]


def make_tokenizer(folder: Path, vocab_size: int = 400) -> Tokenizer:
    """Write `tokenizer.json`, `vocab.json` and `merges.txt` of a small byte-level BPE."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return tokenizer


@untraced()
def make_captioner(folder: Path, seed: int, **changes: Any) -> Any:
    """Save a random `VisionEncoderDecoderModel` with tokenizer and processor; return the model.

    `changes` go to the configs: `encoder`, `decoder` (dicts) and `encoder_type` ("vit", "deit").
    The weights are scaled up, so that the random captions differ between pictures and beams.
    """
    import torch
    from transformers import (
        DeiTConfig,
        DeiTModel,
        GPT2Config,
        GPT2LMHeadModel,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    encoder = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.3,
        **changes.get("encoder", {}),
    }
    decoder = {
        "vocab_size": tokenizer.get_vocab_size(),
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
        "add_cross_attention": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes.get("decoder", {}),
    }
    if changes.get("encoder_type") == "deit":
        first: Any = DeiTModel(DeiTConfig(**encoder))
    else:
        first = ViTModel(ViTConfig(**encoder), add_pooling_layer=bool(seed % 2))
    model = VisionEncoderDecoderModel(
        encoder=first, decoder=GPT2LMHeadModel(GPT2Config(**decoder))
    ).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "position" in name or "token" in name.rsplit(".", 1)[-1]:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        # The end token gets a louder voice, so that captions end, and at different lengths.
        model.decoder.transformer.wte.weight[0] *= 2.5
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = 0
    model.generation_config.max_length = 20
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def make_photo(seed: int, size: tuple[int, int] = (57, 43)) -> Image.Image:
    """Draw a random smooth picture, different for every seed."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def write_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
