"""Compare two openings of one model by the words they give, and tensor by tensor.

Words decide: tensors that agree to twelve digits of cosine have been seen to end in another
caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput, UnsupportedModel
from diptych.runtimes.network import BRIDGED, Network

__all__ = ["Pixels", "compare_tensors", "compare_tokens", "greedy_tokens", "pictures_for"]

Pixels = NDArray[np.float32]

_BATCH = 8


def greedy_tokens(
    networks: Mapping[str, Network],
    images: Sequence[Pixels],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    max_new_tokens: int = 16,
) -> list[list[int]]:
    """Return the likeliest next words of each picture [C, H, W], up to the end token.

    Raises `UnsupportedModel` where the logits are not finite.
    """
    bridge = BRIDGED[config["bridge"]]
    ends = generation.get("eos_token_id")
    ends = set(ends if isinstance(ends, list) else [ends])
    captions: list[list[int]] = []
    for start in range(0, len(images), _BATCH):
        pixels = np.stack(list(images[start : start + _BATCH]))
        bridged = networks["encoder"](pixel_values=pixels)[0]
        words = np.full((len(pixels), 1), generation["decoder_start_token_id"], np.int64)
        past, rows = None, [words]
        places = int(config["decoder"]["max_position_embeddings"])
        if bridge == "prefix_embeds":
            places -= bridged.shape[1]
        for _ in range(min(max_new_tokens, places)):
            logits, past = networks["decoder"](
                input_ids=words, past_key_values=past, **{bridge: bridged}
            )
            if not np.isfinite(logits).all():
                raise UnsupportedModel(
                    "the captioner's logits are not finite: its weights are damaged, or too large "
                    "for this precision"
                )
            words = logits.argmax(-1)[:, None]
            rows.append(words)
            if bridge == "prefix_embeds":
                bridged = None  # the picture is in the cache now
        for row in np.concatenate(rows[1:], axis=1).tolist():
            end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            captions.append(row[:end])
    return captions


def compare_tokens(
    expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Count identical captions, and tokens up to the first difference; tell where the first is."""
    first, same, agreeing = None, 0, 0
    for image, (one, other) in enumerate(zip(expected, found, strict=True)):
        pairs = enumerate(zip(one, other, strict=False))
        shorter = min(len(one), len(other))
        position = next((place for place, (a, b) in pairs if a != b), shorter)
        agreeing += position
        if list(one) == list(other):
            same += 1
        elif first is None:
            first = {"image": image, "position": position}
    return {
        "images": len(expected),
        "identical": same,
        "tokens": sum(len(one) for one in expected),
        "agreeing": agreeing,
        "first_difference": first,
    }


def compare_tensors(
    expected: Mapping[str, Network],
    found: Mapping[str, Network],
    image: Pixels,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """Return the largest absolute difference of every output, by network.

    Two calls of the decoder: the first with two words, then one more with the cache. Both sides
    are given the same picture and words, each its own cache.
    """
    bridge = BRIDGED[config["bridge"]]
    bridged = [side["encoder"](pixel_values=image[None])[0] for side in (expected, found)]
    worst: dict[str, dict[str, float]] = {"encoder": {bridge: _distance(*bridged)}, "decoder": {}}
    start = generation["decoder_start_token_id"]
    words = np.array([[start, (start + 1) % config["decoder"]["vocab_size"]]], np.int64)
    past: list[Any] = [None, None]
    names = ("logits", "present_key_values", "image_attention")
    for _ in range(2):
        made = []
        for side, networks in enumerate((expected, found)):
            given = {"past_key_values": past[side], bridge: bridged[side]}
            made.append(networks["decoder"](names, input_ids=words, **given))
            past[side] = made[-1][1]
        for name, one, other in zip(names, *made, strict=True):
            worst["decoder"][name] = max(worst["decoder"].get(name, 0.0), _distance(one, other))
        words = words[:, 1:]
        if bridge == "prefix_embeds":
            bridged = [None, None]
    return worst


def pictures_for(
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    images: Sequence[Pixels] | None,
    count: int = 32,
) -> list[Pixels]:
    """Return `images` [C, H, W], or `count` seeded ones as preprocessing leaves pictures.

    Those are sums of smooth noise at many scales, with the falling spectrum of photographs.
    """
    if images is not None:
        if not len(images):
            raise BadInput("the list of images to compare on is empty")
        return [np.asarray(image, np.float32) for image in images]
    random = np.random.default_rng(0)
    channels, height = config["encoder"]["num_channels"], config["encoder"]["image_size"]
    shape = (channels, height, height)
    mean = np.asarray(preprocessing.get("image_mean") or [0.5] * channels, np.float32)
    std = np.asarray(preprocessing.get("image_std") or [0.5] * channels, np.float32)
    pictures = []
    for _ in range(count):
        total = np.zeros(shape, np.float32)
        for cells in (2, 4, 8, 16, 32):
            coarse = random.standard_normal((channels, cells + 1, cells + 1)) * 2 / cells**0.7
            total += _enlarge(coarse.astype(np.float32), height)
        picture = 1 / (1 + np.exp(-total))
        normal = (picture - mean[:, None, None]) / std[:, None, None]
        pictures.append(normal.astype(np.float32))
    return pictures


def _enlarge(coarse: Pixels, size: int) -> Pixels:
    """Interpolate [C, n, n] linearly to [C, size, size]."""
    for axis in (1, 2):
        at = np.linspace(0, coarse.shape[axis] - 1.001, size, dtype=np.float32)
        low = at.astype(np.int64)
        weight = (at - low)[:, None] if axis == 1 else at - low
        before, after = coarse.take(low, axis), coarse.take(low + 1, axis)
        coarse = before + (after - before) * weight
    return coarse


def _distance(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max())
