"""Decoding and encoding in pieces, against doing it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from diptych.errors import BadInput
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.runtimes.on_torch_generator import generator_networks
from diptych.runtimes.tiling import InPieces, Tiling, decode_latents, encode_pixels

pytestmark = pytest.mark.usefixtures("one_thread")

TILES = Tiling(tile=64, overlap=16, always=True)


class Scaler:
    """Enlarge by repeating, or shrink by the mean: pieces of it are exactly pieces of the whole."""

    def __init__(self, factor: int, up: bool) -> None:
        self.factor, self.up = factor, up
        self.inputs: Mapping[str, str] = {}
        self.outputs: Mapping[str, str] = {}
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        (array,) = arrays.values()
        self.seen.append(tuple(array.shape))
        plain, factor = np.asarray(array), self.factor
        if self.up:
            made = [plain.repeat(factor, 2).repeat(factor, 3)[:, :3]]
        else:
            rows, channels, high, wide = plain.shape
            blocks = plain.reshape(rows, channels, high // factor, factor, wide // factor, factor)
            made = [blocks.mean((3, 5)), blocks.max((3, 5))]
        is_tensor = isinstance(array, torch.Tensor)
        return tuple(torch.from_numpy(each) if is_tensor else each for each in made)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("size", [(8, 8), (9, 31), (20, 8), (33, 17), (11, 10)])
def test_tiles_add_up_to_the_whole(kind: str, size: tuple[int, int]) -> None:
    latents = random(2, 4, *size)
    given = latents if kind == "numpy" else torch.from_numpy(latents)
    decoder = Scaler(8, up=True)
    found = decode_latents(decoder, given, tiling=TILES)
    assert type(found) is type(given)
    np.testing.assert_allclose(np.asarray(found), decoder(x=latents)[0], atol=1e-6)
    assert all(max(shape[2:]) <= 8 for shape in decoder.seen[:-1])

    pixels = random(2, 3, *(edge * 8 for edge in size))
    given = pixels if kind == "numpy" else torch.from_numpy(pixels)
    encoder = Scaler(8, up=False)
    mean, spread = encode_pixels(encoder, given, tiling=TILES)
    expected = encoder(x=pixels)
    np.testing.assert_allclose(np.asarray(mean), expected[0], atol=1e-6)
    np.testing.assert_allclose(np.asarray(spread), expected[1], atol=1e-6)
    assert all(max(shape[2:]) <= 64 for shape in encoder.seen[:-1])


def test_batches_are_sliced_to_fit() -> None:
    decoder = Scaler(8, up=True)
    latents = random(5, 4, 8, 8)
    found = decode_latents(decoder, latents, tiling=Tiling(most_pixels=2 * 64 * 64))
    assert [shape[0] for shape in decoder.seen] == [2, 2, 1]
    np.testing.assert_array_equal(found, decoder(x=latents)[0])


def test_pictures_are_tiled_above_a_size_only() -> None:
    decoder = Scaler(8, up=True)
    decode_latents(decoder, random(1, 4, 128, 128))
    assert decoder.seen == [(1, 4, 128, 128)]
    decode_latents(decoder, random(1, 4, 128, 130))
    assert len(decoder.seen) > 2 and max(decoder.seen[-1][2:]) == 64


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_overlap_hides_what_a_decoder_does_at_edges(kind: str) -> None:
    torch.manual_seed(3)
    config = VaeConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    vae = Vae(config).eval()
    for parent in [*vae.modules()]:  # what looks at the whole picture; convolutions look nearby
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(parent, name, torch.nn.Identity())
    networks = generator_networks({"unet": UNet(UNetConfig.tiny()), "vae": vae})
    decoder, latents = networks["vae_decoder"], random(1, 4, 64, 64)
    whole = networks.numpy(decoder(latents=latents)[0])
    errors = []
    for overlap in (0, 32):
        given = networks.array(latents) if kind == "torch" else latents
        tiling = Tiling(tile=64, overlap=overlap, always=True)
        tiled = networks.numpy(decode_latents(decoder, given, downsampling=2, tiling=tiling))
        errors.append(np.abs(tiled - whole).max() / whole.std())
    assert errors[1] < 0.1 < 0.3 < errors[0]


def test_a_network_in_pieces_is_a_network() -> None:
    whole = Scaler(8, up=False)
    whole.inputs = {"pixel_values": "B 3 H W"}
    whole.outputs = {"mean": "B c h w", "log_variance": "B c h w"}
    pieces = InPieces(whole, 8, TILES)
    pixels = random(2, 3, 96, 64)
    expected = whole(x=pixels)
    for found, one in zip(pieces(pixel_values=pixels), expected, strict=True):
        np.testing.assert_allclose(found, one, atol=1e-6)
    (spread,) = pieces(["log_variance"], pixel_values=pixels)
    np.testing.assert_allclose(spread, expected[1], atol=1e-6)
    assert max(whole.seen[-1][2:]) <= 64


@pytest.mark.parametrize(
    ("words", "message"),
    [({"overlap": 300}, "overlap is 300: give 0 to 256"), ({"tile": 32}, "tile is 32 pixels")],
)
def test_tiles_that_cannot_be(words: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Tiling(**words)
