"""Random captioners of every kind, as modules and as artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych.models.gpt2 import Gpt2Config
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.models.vit import ViTConfig
from tiny_models import make_tokenizer

GENERATION = {"decoder_start_token_id": 0, "eos_token_id": 0, "max_length": 20}
PREPROCESSING = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Changes of the encoder, of the decoder, and the bridge.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cross-attention": ({}, {}, "cross-attention"),
    "prefix": ({}, {}, "prefix"),
    "deit": ({"distillation_token": True}, {}, "cross-attention"),
    "enc_to_dec_proj": ({"hidden_size": 48, "num_attention_heads": 3}, {}, "cross-attention"),
    "stem": (
        {"stem_channels": (8, 12, 16), "stem_blocks": 1, "hidden_act": "gelu_new"},
        {"num_hidden_layers": 1},
        "prefix",
    ),
    "untied": (
        {"qkv_bias": False, "hidden_act": "quick_gelu"},
        {"tie_word_embeddings": False, "hidden_act": "relu", "scale_attn_weights": False},
        "cross-attention",
    ),
    "odd": (
        {"hidden_act": "silu", "hidden_size": 40, "intermediate_size": 72},
        {
            "hidden_act": "gelu",
            "hidden_size": 24,
            "num_attention_heads": 2,
            "intermediate_size": 100,
            "num_hidden_layers": 3,
            "scale_attn_by_inverse_layer_idx": True,
        },
        "prefix",
    ),
}


def make_module(variant: str = "cross-attention", seed: int = 0) -> VisionEncoderDecoder:
    encoder, decoder, bridge = VARIANTS[variant]
    config = VisionEncoderDecoderConfig(
        dataclasses.replace(ViTConfig.tiny(), **encoder),
        dataclasses.replace(
            Gpt2Config.tiny(),
            vocab_size=400,
            add_cross_attention=bridge == "cross-attention",
            **decoder,
        ),
        bridge,
    )
    torch.manual_seed(seed + 100)
    module = VisionEncoderDecoder(config).eval()
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            torch.nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.dim() > 1:
            # What attention adds must outweigh the word itself, or a tied head repeats it for ever.
            small, large = "wte" in name, "c_proj" in name
            torch.nn.init.normal_(tensor, std=0.1 if small else 0.8 if large else 0.3)
        elif "norm" in name or "ln_" in name:
            torch.nn.init.normal_(tensor, 1.0, 0.2)
        else:
            torch.nn.init.normal_(tensor, std=0.2)
    return module


def make_pictures(count: int, seed: int = 0) -> np.ndarray:
    # Coarse, because fine noise is the same everywhere to those who average over it.
    coarse = 2 * np.random.default_rng(seed).standard_normal((count, 3, 4, 4))
    return coarse.repeat(8, axis=2).repeat(8, axis=3).astype(np.float32)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on one core: with networks this small, threads wait for each other more than they work.

    After the fixture that seeds, which gives torch two.
    """
    from diptych.runtimes import on_onnxruntime, on_openvino

    for runtime in (on_onnxruntime, on_openvino):
        monkeypatch.setattr(runtime, "available_cores", lambda: 1)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def module() -> Callable[..., VisionEncoderDecoder]:
    """Return a builder: `module(variant, seed)` → a random captioner in evaluation mode."""
    return make_module


@pytest.fixture(scope="session")
def pictures() -> Callable[..., np.ndarray]:
    return make_pictures


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def export(tokenizer: Path) -> Callable[..., dict[str, Any]]:
    """Return an exporter: `export(module, folder, **words)` → the report.

    `words` are those of `Shrinking`, the words to keep, and another tokenizer.
    """
    from diptych.runtimes.export import Belongings, export_captioner
    from diptych.runtimes.smaller_captioner import Shrinking

    def run(captioner: VisionEncoderDecoder, folder: Path, **words: Any) -> dict[str, Any]:
        kept, source = words.pop("words", None), {"name": "random", "revision": None}
        edge = captioner.config.encoder.image_size
        belongings = Belongings(
            {**PREPROCESSING, "size": {"height": edge, "width": edge}},
            GENERATION,
            words.pop("tokenizer", tokenizer),
            source,
        )
        wanted = Shrinking(**{"images": list(make_pictures(8)), **words})
        return export_captioner(captioner, folder, belongings, wanted, words=kept)

    return run


@pytest.fixture(scope="session")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory, export: Callable[..., dict[str, Any]]
) -> Callable[[str], Path]:
    """Return a finder: the folder of a variant, fp32 and int8 below it, exported once."""
    home, done = tmp_path_factory.mktemp("artifacts"), set()

    def find(variant: str) -> Path:
        from diptych.runtimes import quantize, smaller_captioner

        folder = home / variant
        if variant not in done:
            export(make_module(variant), folder / "fp32")
            with pytest.MonkeyPatch.context() as patch:
                # As for a vocabulary of full size; a tiny one would stay in half precision.
                patch.setattr(quantize, "_FEW_WORDS", 0)
                patch.setattr(smaller_captioner, "_WANTED_IDENTICAL", 0)  # no sweep
                smaller_captioner.quantize_captioner(
                    folder / "fp32", folder / "int8", images=make_pictures(8), force=True
                )
            done.add(variant)
        return folder

    return find


@pytest.fixture
def own(artifacts: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return an artifact of the test's own, to be damaged."""
    for path in (artifacts("cross-attention") / "fp32").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
