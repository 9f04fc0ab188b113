"""The text towers against transformers, through files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diptych.models.clip_text import ClipText, ClipTextConfig

EOS = 299
SHARED: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "eos_token_id": EOS,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip-l": {},
    "clip-l of old configs": {"eos_token_id": 2},
    "clip-h": {"hidden_act": "gelu"},
    "clip-l in sdxl": {"output_layer": -2, "output_norm": False},
    "clip-bigg": {
        "hidden_act": "gelu",
        "projection_dim": 24,
        "output_layer": -2,
        "output_norm": False,
    },
}


def make_pair(folder: Path, config: dict[str, Any]) -> tuple[Any, ClipText]:
    ours = ClipTextConfig(**{**SHARED, **config})
    theirs = {**SHARED, **config}
    theirs = {k: v for k, v in theirs.items() if not k.startswith("output_")}
    kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
    reference = kind(CLIPTextConfig(bos_token_id=298, pad_token_id=0, **theirs)).eval()
    for name, parameter in reference.named_parameters():
        # Norms start as 1 and 0, which would hide one that is missing or in the wrong place.
        mean = float("norm" in name and "weight" in name)
        torch.nn.init.normal_(parameter, mean, 0.2)
    reference.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    # transformers 5 leaves the prefix away in one of the two classes.
    stored = {
        name if name.startswith("text_") else f"text_model.{name}": tensor
        for name, tensor in stored.items()
    }
    stored.pop("text_model.embeddings.position_ids", None)
    model = ClipText(ours).eval()
    model.load_state_dict(stored, strict=True)
    return reference, model


def make_ids(length: int) -> torch.Tensor:
    """Rows that end at different places, one filled up with end tokens, one with zeros."""
    ids = torch.randint(3, 290, (3, length))
    ids[:, 0] = 298
    ids[0, 4:] = EOS
    ids[1, 6], ids[1, 7:] = EOS, 0
    ids[2, -1] = EOS
    return ids


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [77, 12])
def test_encodes_as_the_reference(name: str, length: int, tmp_path: Path) -> None:
    reference, model = make_pair(tmp_path, CONFIGS[name])
    config, ids = model.config, make_ids(length)
    norm = getattr(reference, "text_model", reference).final_layer_norm
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        pooled = (
            expected.text_embeds if config.projection_dim is not None else expected.pooler_output
        )
        for skip in range(3):
            hidden = expected.hidden_states[config.output_layer - skip]
            hidden = norm(hidden) if config.output_norm else hidden
            for clip_skip in (skip, torch.tensor(skip)):
                found, found_pooled = model(ids, clip_skip)
                torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(found_pooled, pooled, atol=1e-5, rtol=1e-5)


def test_gives_the_last_state_by_default(tmp_path: Path) -> None:
    reference, model = make_pair(tmp_path, CONFIGS["clip-l"])
    ids = make_ids(77)
    with torch.no_grad():
        expected = reference(ids).last_hidden_state
        torch.testing.assert_close(model(ids)[0], expected, atol=1e-5, rtol=1e-5)


def test_trains() -> None:
    model = ClipText(ClipTextConfig.tiny())
    hidden, pooled = model(torch.tensor([[1, 2, 999, 999]]))
    (hidden.square().mean() + pooled.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (ClipTextConfig(), 123.1),
        (
            ClipTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
            ),
            694.7,
        ),
    ],
)
def test_has_the_published_sizes(config: ClipTextConfig, millions: float) -> None:
    with torch.device("meta"):
        model = ClipText(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
