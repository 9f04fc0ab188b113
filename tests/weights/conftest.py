"""Tiny random captioners of transformers, on disk in every layout that is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START = 5  # the id of the end-of-text token in the tiny vocabulary


def write_tokenizer(folder: Path) -> None:
    vocab = {"<|endoftext|>": START, "a": 0, "b": 1, "Ġ": 2, "c": 3, "d": 4}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": START,
                "content": "<|endoftext|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Return transformers, silent."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="session")
def reference(transformers: Any) -> Callable[..., Any]:
    """Return a builder: `reference(seed, **choices)` → a VisionEncoderDecoderModel in eval mode."""

    def build(seed: int = 0, **choices: Any) -> Any:
        import torch

        draw = random.Random(seed)
        torch.manual_seed(seed)
        encoder_kind = choices.pop("encoder_kind", draw.choice(["vit", "deit"]))
        encoder_width = 4 * draw.randint(2, 8)
        decoder_width = choices.pop("decoder_width", draw.choice([encoder_width, 24]))
        patch = draw.choice([4, 8])
        encoder = {
            "image_size": patch * draw.randint(2, 4),
            "patch_size": patch,
            "num_channels": draw.choice([1, 3]),
            "hidden_size": encoder_width,
            "num_hidden_layers": draw.randint(1, 3),
            "num_attention_heads": draw.choice([1, 2, 4]),
            "intermediate_size": draw.choice([16, 40]),
            "hidden_act": draw.choice(["gelu", "gelu_new", "quick_gelu", "relu", "silu"]),
            "layer_norm_eps": draw.choice([1e-12, 1e-3]),
            "qkv_bias": draw.choice([True, False]),
        }
        decoder = {
            "vocab_size": draw.randint(11, 40),
            "n_positions": draw.randint(12, 20),
            "n_embd": decoder_width,
            "n_layer": draw.randint(1, 12 if seed == 1 else 3),
            "n_head": draw.choice([1, 2, 4]),
            "n_inner": draw.choice([None, 20]),
            "activation_function": draw.choice(["gelu_new", "gelu", "relu"]),
            "layer_norm_epsilon": draw.choice([1e-5, 1e-2]),
            "scale_attn_weights": draw.choice([True, True, False]),
            "scale_attn_by_inverse_layer_idx": draw.choice([False, True]),
            "tie_word_embeddings": choices.pop("tied", draw.choice([True, True, False])),
            "bos_token_id": START,
            "eos_token_id": START,
        }
        kinds = {"vit": transformers.ViTConfig, "deit": transformers.DeiTConfig}
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            kinds[encoder_kind](**{**encoder, **choices.pop("encoder", {})}),
            transformers.GPT2Config(**{**decoder, **choices.pop("decoder", {})}),
            decoder_start_token_id=START,
            eos_token_id=START,
            pad_token_id=START,
        )
        assert not choices, choices
        model = transformers.VisionEncoderDecoderModel(config).eval()
        model.generation_config.decoder_start_token_id = START
        with torch.no_grad():
            # Fresh biases are 0 and fresh norms 1: a mix-up among them would not show.
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture(scope="session")
def save_reference() -> Callable[..., Path]:
    """Return `save(model, folder, **options of save_pretrained)`, which adds a tokenizer."""

    def save(model: Any, folder: Path, **options: Any) -> Path:
        model.save_pretrained(folder, **options)
        write_tokenizer(folder)
        return folder

    return save


@pytest.fixture
def checkpoint(
    tmp_path: Path, reference: Callable[..., Any], save_reference: Callable[..., Path]
) -> Path:
    """Return the folder of one small checkpoint, to be broken."""
    model = reference(3, encoder_kind="vit", decoder_width=24, tied=True)
    return save_reference(model, tmp_path / "checkpoint")


@pytest.fixture
def edit() -> Callable[..., None]:
    """Return `edit(path, {"a.b": value})`, which rewrites a JSON file; None removes."""

    def change(path: Path, changes: dict[str, Any]) -> None:
        document = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for word, value in changes.items():
            *parents, last = word.split(".")
            place = document
            for parent in parents:
                place = place.setdefault(parent, {})
            if value is None:
                place.pop(last, None)
            else:
                place[last] = value
        path.write_text(json.dumps(document), "utf-8")

    return change
