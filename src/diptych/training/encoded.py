"""Encode pictures and words for a generator that learns, and keep what was encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diptych.canvas import to_pixel_values
from diptych.models.vae import Vae
from diptych.text import ClipTokenizer
from diptych.training.buckets import Size
from diptych.training.cache import TensorCache, cache_key
from diptych.training.data import Item
from diptych.training.options import GeneratorTrainOptions
from diptych.training.resting import Resting
from diptych.training.workplace import Workplace
from diptych.weights.generator_files import GeneratorFolder

__all__ = ["Encoder", "Shown"]


@dataclass(frozen=True, slots=True)
class Shown:
    """Hold a picture's latents [C, h, w], and the heights and widths that SDXL is told."""

    latents: Tensor
    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


class Encoder:
    """Turn pictures into latents and captions into vectors, each once where that can be."""

    def __init__(
        self,
        model: GeneratorFolder,
        modules: Mapping[str, nn.Module],
        tokenizers: Mapping[str, ClipTokenizer],
        options: GeneratorTrainOptions,
        place: Workplace,
        resting: Resting,
    ) -> None:
        self._options, self._device, self._resting = options, place.device, resting
        self._vae, self._tokenizers = cast(Vae, modules["vae"]), tokenizers
        self._texts = {n: each for n, each in modules.items() if n.startswith("text_encoder")}
        folder = place.folder / "cache"
        self._pictures, self._words = TensorCache(folder / "latents"), TensorCache(folder / "words")
        weights = _identity(model)
        self._of_vae = {"weights": weights, "config": model.configs["vae"]}
        self._of_text = {
            "weights": weights,
            "configs": [c for n, c in model.configs.items() if n.startswith("text_encoder")],
            "precision": options.mixed_precision,
        }

    def latents(
        self, item: Item, size: Size, seed: tuple[int, ...] = (), *, is_flipped: bool = False
    ) -> Shown:
        """Return scaled latents, drawn by `seed` from what the autoencoder says of the picture.

        Their mean without one.
        """
        options, picture = self._options, (item.width, item.height)
        corner = _middle(picture, size) if options.center_crop else _anywhere(picture, size, seed)

        def encode() -> dict[str, Tensor]:
            image = _covering(item.open(), size, corner)
            if is_flipped:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(to_pixel_values(image))[None].to(self._device)
            self._resting.wake("vae")
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                mean, log_variance = self._vae.float().encode(pixels)
            return {"mean": mean[0].cpu(), "std": (0.5 * log_variance[0]).exp().cpu()}

        if options.cache_latents:
            key = cache_key(
                picture=item.digest, size=size, corner=corner, flip=is_flipped, **self._of_vae
            )
            kept = self._pictures.get(key, encode)
        else:
            kept = encode()
        drawn = kept["mean"]
        if seed:
            noise = np.random.default_rng([*seed, 13]).standard_normal(drawn.shape, np.float32)
            drawn = drawn + kept["std"] * torch.from_numpy(noise)
        config = self._vae.config
        return Shown(
            (drawn - config.shift_factor) * config.scaling_factor,
            original=(item.height, item.width),
            corner=(corner[1], corner[0]),
            size=(size[1], size[0]),
        )

    def kept_words(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what `words` does, for text encoders that do not learn: each caption once."""
        each = [self._kept_words(caption) for caption in captions]
        states = torch.stack([one["words"] for one in each]).to(self._device)
        return states, torch.stack([one["pooled"] for one in each]).to(self._device)

    def words(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return `encoder_hidden_states` [B, T, D] and the pooled vector [B, E] of captions."""
        states, pooled = [], torch.zeros(0)
        for name, encoder in self._texts.items():
            tokenizer = self._tokenizers[name.replace("text_encoder", "tokenizer")]
            ids = torch.tensor([tokenizer.encode(each) for each in captions], device=self._device)
            found, pooled = encoder(ids)
            states.append(found)
        return torch.cat(states, -1), pooled

    def _kept_words(self, caption: str) -> dict[str, Tensor]:
        def encode() -> dict[str, Tensor]:
            self._resting.wake(*self._texts)
            with torch.no_grad():
                states, pooled = self.words([caption])
            return {"words": states[0], "pooled": pooled[0]}

        return self._words.get(cache_key(caption=caption, **self._of_text), encode)


def _identity(model: GeneratorFolder) -> list[list[Any]]:
    """Tell these weights from others: by the sizes and times of their files."""
    files = sorted({path for paths in model.weights.values() for path in paths})
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _scaled(picture: Size, size: Size) -> Size:
    """Return the size of a picture that just covers `size`."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    return max(size[0], round(picture[0] * scale)), max(size[1], round(picture[1] * scale))


def _middle(picture: Size, size: Size) -> tuple[int, int]:
    inner = _scaled(picture, size)
    return (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2


def _anywhere(picture: Size, size: Size, seed: tuple[int, ...]) -> tuple[int, int]:
    inner = _scaled(picture, size)
    rng = np.random.default_rng([*seed, 17])
    return (
        int(rng.integers(inner[0] - size[0] + 1)),
        int(rng.integers(inner[1] - size[1] + 1)),
    )


def _covering(image: Image.Image, size: Size, corner: tuple[int, int]) -> Image.Image:
    """Return `size` pixels of the picture, scaled to just cover them, from `corner` on."""
    inner = _scaled(image.size, size)
    if image.size != inner:
        image = image.resize(inner, Image.Resampling.LANCZOS)
    left, top = corner
    return image.crop((left, top, left + size[0], top + size[1]))
