"""Turn pictures into latents and back, by the autoencoder of a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput, DiptychError
from diptych.runtimes.network import Array, OpenNetworks, require_torch
from diptych.text_to_image.previews import fit_latent_rgb, latent_to_rgb

__all__ = ["Autoencoder"]

Floats = NDArray[np.float32]


class Autoencoder:
    """Hold what an autoencoder's config says, beside its two networks.

    `downsampling` is how many pixels a latent stands for, each way. `latent_rgb` are colours for
    previews, learned from the autoencoder itself where they are None.
    """

    def __init__(
        self,
        networks: OpenNetworks,
        config: Mapping[str, Any],
        name: str,
        latent_rgb: object = None,
    ) -> None:
        self._networks, self._name = networks, name
        halvings = len(config["block_out_channels"]) - 1
        self.downsampling = int(config.get("patch_size", 1)) << halvings
        self.latent_channels = int(config.get("latent_channels", 4))
        self._scaling_factor = float(config.get("scaling_factor", 0.18215))
        self._shift_factor = float(config.get("shift_factor", 0.0))
        self._latent_rgb = None if latent_rgb is None else np.asarray(latent_rgb, np.float64)
        self._preview: Callable[[Array], list[Image.Image]] | None = None

    def show_with(self, folder: str | Path) -> None:
        """Let a tiny VAE make the previews from here on; raises `BadInput` for another's."""
        require_torch("previews by a tiny VAE")
        from diptych.runtimes.on_torch_generator import open_preview_vae

        network, config = open_preview_vae(folder, self._networks.device)
        wanted = (self.latent_channels, self.downsampling)
        if (config.latent_channels, config.downsampling) != wanted:
            raise BadInput(
                f"{folder} decodes latents of {config.latent_channels} channels to "
                f"{config.downsampling} pixels each, and {self._name} makes {wanted[0]} of "
                f"{wanted[1]}: give the tiny VAE of its family"
            )

        def show(latents: Array) -> list[Image.Image]:
            (pixels,) = network(latents=latents / config.scaling_factor + config.shift_factor)
            return _pictures(np.nan_to_num(self._networks.numpy(pixels)))

        self._preview = show

    def encode(self, pixel_values: Floats) -> Floats:
        """Return the scaled latents [B, C, h, w] of pixels [B, 3, H, W] in -1..1."""
        mean, _ = self._networks["vae_encoder"](pixel_values=self._networks.array(pixel_values))
        return (self._networks.numpy(mean) - self._shift_factor) * self._scaling_factor

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the pictures of scaled latents [B, C, h, w].

        Raises `DiptychError` where a picture would hold numbers that are not finite.
        """
        if len(latents.shape) != 4 or latents.shape[1] != self.latent_channels:
            raise BadInput(
                f"latents have the shape {list(latents.shape)}: give "
                f"[pictures, {self.latent_channels}, height, width]"
            )
        array, numpy = self._networks.array, self._networks.numpy
        unscaled = array(latents) if isinstance(latents, np.ndarray) else latents
        unscaled = unscaled / self._scaling_factor + self._shift_factor
        (decoded,) = self._networks["vae_decoder"](latents=unscaled)
        pixels = numpy(decoded)
        if not np.isfinite(pixels).all():
            raise DiptychError(
                f"{self._name}: the decoded picture holds numbers that are not finite: the "
                "latents or the weights of the autoencoder are damaged"
            )
        return _pictures(pixels)

    def show(self, latents: Array) -> list[Image.Image]:
        """Return pictures of latents in full size: a tiny VAE's, or blurred by colours alone."""
        if self._preview is not None:
            return self._preview(latents)
        if self._latent_rgb is None:
            self._latent_rgb = np.asarray(fit_latent_rgb(self.encode, self.downsampling))
        small = latent_to_rgb(self._networks.numpy(latents), self._latent_rgb)
        return [
            image.resize(
                (image.width * self.downsampling, image.height * self.downsampling),
                Image.Resampling.BICUBIC,
            )
            for image in small
        ]


def _pictures(pixels: Floats) -> list[Image.Image]:
    """Return the pictures of pixels [B, 3, H, W] in -1..1."""
    levels = (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels.transpose(0, 2, 3, 1)]
