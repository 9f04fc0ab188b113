"""A generator around networks that are plain functions: fast, and it knows the truth.

It takes a text for a colour, and predicts exactly the noise that leads to it. Whatever sampler and
number of steps, the picture has that colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from diptych import ImageGenerator
from diptych.runtimes.network import OpenNetworks
from diptych.text import ClipTokenizer
from diptych.text_to_image.schedules import NoiseSchedule
from diptych.weights.diffusion import GeneratorFolder

MERGES = (
    Path(__file__).resolve().parents[1]
    / "src/diptych/weights/embedded/clip_tokenizer/bpe_simple_vocab_16e6.txt.gz"
)
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "grey": (0, 0, 0)}
SIDE, DOWN = 32, 8
SIGMAS = NoiseSchedule().sigmas


class FakeNetwork:
    def __init__(self, call: Callable[..., Any], inputs: Mapping[str, str] | None = None) -> None:
        self.call, self.inputs, self.outputs = call, inputs or {}, {}
        self.calls: list[dict[str, Any]] = []

    def __call__(self, wanted: Any = None, /, **arrays: Any) -> Any:
        self.calls.append(arrays)
        return self.call(**arrays)


@cache
def make_tokenizer() -> ClipTokenizer:
    return ClipTokenizer.from_merges(MERGES)


def make_generator(**changes: Any) -> ImageGenerator:
    """Build the generator; `changes` replace networks, configs and defaults."""
    tokenizer = make_tokenizer()
    ids = {tokenizer.tokens(word)[0]: colour for word, colour in COLOURS.items()}

    def text_encoder(input_ids: Any, clip_skip: int = 0) -> Any:
        hidden = np.zeros((*input_ids.shape, 4), np.float32)
        for token, colour in ids.items():
            hidden[input_ids == token, :3] = colour
        return hidden, hidden.sum(1)

    def truth(encoder_hidden_states: Any, shape: tuple[int, ...]) -> Any:
        return np.broadcast_to(encoder_hidden_states.sum(1)[:, :, None, None], shape)

    def unet(latents: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        sigma = np.interp(timestep, np.arange(1000), SIGMAS)[:, None, None, None]
        x = latents[:, :4] * np.sqrt(sigma**2 + 1)
        noise = (x - truth(encoder_hidden_states, x.shape)) / sigma
        return (noise.astype(np.float32),)

    def vae_decoder(latents: Any) -> Any:
        return (latents[:, :3].repeat(DOWN, 2).repeat(DOWN, 3),)

    def vae_encoder(pixel_values: Any) -> Any:
        batch, _, height, width = pixel_values.shape
        blocks = pixel_values.reshape(batch, 3, height // DOWN, DOWN, width // DOWN, DOWN)
        mean = np.concatenate([blocks.mean((3, 5)), np.zeros_like(blocks[:, :1, :, 0, :, 0])], 1)
        return mean, mean * 0

    networks = {
        "text_encoder": FakeNetwork(text_encoder),
        "unet": FakeNetwork(unet, {"latents": "", "timestep": "", "encoder_hidden_states": ""}),
        "vae_encoder": FakeNetwork(vae_encoder),
        "vae_decoder": FakeNetwork(vae_decoder),
        **changes.get("networks", {}),
    }
    model = GeneratorFolder(
        path=Path("nowhere"),
        name="fake",
        revision=None,
        family="sd1",
        configs={
            "text_encoder": {"num_hidden_layers": 12, "output_layer": -1},
            "unet": {"sample_size": SIDE // DOWN, "in_channels": 4, **changes.get("unet", {})},
            "vae": {"block_out_channels": (1, 1, 1, 1), "scaling_factor": 1.0},
        },
        schedule={},
        tokenizers={},
        weights={},
        layout="diffusers",
        networks={},
        precision=None,
        defaults={"guidance_scale": 1.0, "num_inference_steps": 5, **changes.get("defaults", {})},
        force_zeros_for_empty_prompt=changes.get("force_zeros", False),
    )
    opened = OpenNetworks(
        networks, runtime="onnxruntime", device="cpu", dtype="float32", reason="a test"
    )
    return ImageGenerator(opened, {"tokenizer": tokenizer}, model)
