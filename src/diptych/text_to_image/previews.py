"""Show a picture while it is made: the steps on the way, and cheap pictures of latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.runtimes.network import Array
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.orders import Order

__all__ = ["DenoisingStep", "fit_latent_rgb", "latent_to_rgb"]

Floats = NDArray[np.floating]

_SIDE = 128  # pixels of the pictures that the colours are learned from
_PICTURES = 2
_KNOTS = 6


@dataclass(frozen=True, slots=True, eq=False)
class DenoisingStep:
    """Hold one step of `total`, done for one or more pictures at once.

    `latents` [B, C, h, w] are the pictures with noise of standard deviation `sigma`, those of the
    last step finished; `denoised` is what the network takes the pictures for. Both stay where the
    runtime keeps them; `generator.decode` turns them into pictures.
    """

    index: int
    total: int
    sigma: float
    latents: Array
    denoised: Array
    orders: tuple[Order, ...]
    _show: Callable[[Array], list[Image.Image]] = field(repr=False)
    _finish: Callable[[Array, int], GeneratedImage] = field(repr=False)

    @property
    def is_last(self) -> bool:
        return self.index == self.total - 1

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(order.prompt for order in self.orders)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(order.seed for order in self.orders)

    def preview(self, row: int = 0) -> Image.Image:
        """Return a picture of what is to come: blurred, or by a tiny VAE where one is loaded.

        `row` is the place of the picture among those made at once.
        """
        return self.previews()[row]

    def previews(self) -> list[Image.Image]:
        """Return the preview of every picture made at once."""
        return self._show(self.denoised)

    def result(self, row: int = 0) -> GeneratedImage:
        """Decode the picture as the network sees it now; at the last step, the finished one."""
        return self._finish(self.latents if self.is_last else self.denoised, row)


def latent_to_rgb(latents: Floats, latent_rgb: Floats) -> list[Image.Image]:
    """Return one picture of h × w pixels for each of the latents [B, C, h, w].

    `latent_rgb` [C + 1, 3] maps a latent pixel and a final 1 to red, green and blue in -1..1.
    """
    pixels = np.einsum("bchw,cr->bhwr", latents, latent_rgb[:-1]) + latent_rgb[-1]
    levels = np.clip(np.nan_to_num(pixels) * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]


def fit_latent_rgb(encode: Callable[[NDArray[np.float32]], Floats], downsampling: int) -> Floats:
    """Learn [C + 1, 3] by least squares from an autoencoder's own latents of smooth pictures.

    `encode` maps pixels [B, 3, H, W] in -1..1 to scaled latents [B, C, h, w]. The pictures are
    seeded, so that the same autoencoder always gets the same colours.
    """
    pixels = _smooth_pictures(_PICTURES, _SIDE // downsampling * downsampling)
    latents = encode(pixels)
    batch, channels, height, width = latents.shape
    small = pixels.reshape(batch, 3, height, downsampling, width, downsampling).mean((3, 5))
    rows = latents.transpose(0, 2, 3, 1).reshape(-1, channels)
    wanted = small.transpose(0, 2, 3, 1).reshape(-1, 3)
    known = np.concatenate([rows, np.ones_like(rows[:, :1])], axis=1).astype(np.float64)
    # A little ridge, for an autoencoder may leave a channel unused.
    ridge = 1e-4 * len(known) * np.eye(channels + 1)
    ridge[-1, -1] = 0
    solved: Floats = np.linalg.solve(known.T @ known + ridge, known.T @ wanted)
    return solved


def _smooth_pictures(count: int, side: int) -> NDArray[np.float32]:
    """Draw pictures [count, 3, side, side] of many colours that change slowly."""
    random = np.random.default_rng(0)
    knots = random.integers(0, 256, (count, _KNOTS, _KNOTS, 3), dtype=np.uint8)
    drawn = [Image.fromarray(k).resize((side, side), Image.Resampling.BICUBIC) for k in knots]
    levels = np.stack([np.asarray(picture, np.float32) for picture in drawn])
    return np.ascontiguousarray(levels.transpose(0, 3, 1, 2) / 127.5 - 1)
