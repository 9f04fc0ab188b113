"""Make these files: random captioners of transformers 4.57.6, and what it says of photos.

pip install transformers==4.57.6 torch==2.13.0    # in an environment of its own
PYTHONPATH=tests python tests/golden/transformers-4.57.6/make.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tiny_models import make_photo, make_tokenizer

HERE = Path(__file__).parent
OPTIONS: list[dict[str, Any]] = [
    {"max_length": 16},
    {"max_length": 16, "num_beams": 4},
    {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.4},
    {"max_length": 14, "num_beams": 2, "early_stopping": True, "no_repeat_ngram_size": 2},
    {"max_length": 12, "num_beams": 5, "early_stopping": "never", "length_penalty": -0.7},
    {"max_length": 18, "repetition_penalty": 1.4, "min_length": 8},
]


def make(seed: int) -> list[dict[str, Any]]:
    """Save model `seed`: 0 ViT, 1 ViT of another width as `.bin`, 2 DeiT; return its captions."""
    folder = HERE / str(seed)
    words = make_tokenizer(folder).get_vocab_size()
    torch.manual_seed(seed)
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 48 if seed == 1 else 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = {**size, **layers, "initializer_range": 0.3}
    first = DeiTModel(DeiTConfig(**encoder)) if seed == 2 else ViTModel(ViTConfig(**encoder))
    decoder = GPT2Config(
        vocab_size=words,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        add_cross_attention=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = VisionEncoderDecoderModel(encoder=first, decoder=GPT2LMHeadModel(decoder)).eval()
    with torch.no_grad():
        model.decoder.transformer.wte.weight[0] *= 2.5
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = 0
    model.save_pretrained(folder, safe_serialization=seed != 1)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    rows = []
    for photo in range(seed * 10, seed * 10 + 3):
        pixels = processor(make_photo(photo), return_tensors="pt").pixel_values
        for options in OPTIONS:
            with torch.no_grad():
                out = model.generate(
                    pixels, return_dict_in_generate=True, output_scores=True, **options
                )
            ids = [
                row[: row.index(0) + 1] if 0 in row else row
                for row in out.sequences[:, 1:].tolist()
            ]
            scores = out.sequences_scores.tolist() if "num_beams" in options else None
            common = {"model": str(seed), "photo": photo, "options": options}
            rows.append({**common, "token_ids": ids, "scores": scores})
    return rows


if __name__ == "__main__":
    lines = [json.dumps(row) + "\n" for seed in range(3) for row in make(seed)]
    (HERE / "expected.jsonl").write_text("".join(lines))
