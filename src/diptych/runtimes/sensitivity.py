"""Find the matrices that bear rounding badly: round one unit at a time, and ask the next words.

What counts is how far the distribution over the next word moves (Kullback-Leibler divergence, nats
a word, along the captions of the unrounded model). Seen before: most units cost next to nothing,
and a few most of it all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.runtimes.agreement import Pixels
from diptych.runtimes.artifact import NETWORKS
from diptych.runtimes.blocks import round_rows, widen_rows
from diptych.runtimes.graph import read_network
from diptych.runtimes.network import BRIDGED, Network
from diptych.runtimes.on_onnxruntime import OnnxSession
from diptych.runtimes.onnx_networks import OnnxDecoder, OnnxEncoder
from diptych.runtimes.quantize import Bits, unit_of

__all__ = ["Unit", "spare", "squeeze", "sweep"]

Floats = NDArray[np.float32]

_PICTURES, _WORDS = 2, 6


@dataclass(frozen=True, slots=True)
class Unit:
    """Hold what rounding one unit costs: `divergence` in nats a word, `numbers` in its matrices."""

    name: str
    divergence: float
    numbers: int


def sweep(
    files: Mapping[str, Path],
    images: Sequence[Pixels],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    bits: int,
) -> list[Unit]:
    """Round every unit of the float32 networks in `files` alone; the costliest unit first.

    The first two of `images` [C, H, W] are looked at, for six words each.
    """
    bridge = BRIDGED[config["bridge"]]
    pixels = np.stack(list(images[:_PICTURES]))
    networks: dict[str, Network] = {name: _open(name, files[name]) for name in NETWORKS}
    seen = networks["encoder"](pixel_values=pixels)[0]
    start = np.full((len(pixels), 1), generation["decoder_start_token_id"], np.int64)
    expected, words = _foresee(networks["decoder"], bridge, seen, start, None)
    units: dict[str, Unit] = {}  # the keys of the picture stand in the encoder's file
    for network in NETWORKS:
        for name, rounded in _units(files[network], bits):
            changed = _open(network, files[network], rounded)
            other = changed(pixel_values=pixels)[0] if network == "encoder" else seen
            decoder = changed if network == "decoder" else networks["decoder"]
            found, _ = _foresee(decoder, bridge, other, start, words)
            numbers = sum(array.size for array in rounded.values())
            other_half = units.get(name, Unit(name, 0.0, 0))
            units[name] = Unit(
                name,
                other_half.divergence + _divergence(expected, found),
                other_half.numbers + numbers,
            )
    return sorted(units.values(), key=lambda unit: -unit.divergence)


def spare(bits: Bits, units: Sequence[Unit], room: int) -> Bits:
    """Return `bits` with twice as many for the units that gain most for their bytes.

    As long as those bytes fit in `room`, and a unit costs more than the median one.
    """
    typical = float(np.median([unit.divergence for unit in units])) if units else 0.0
    widened = dict(bits.units)
    for unit in sorted(units, key=lambda unit: -unit.divergence / unit.numbers):
        more = unit.numbers * bits.usual // 8
        if unit.divergence > typical and more <= room:
            widened[unit.name] = 2 * bits.usual
            room -= more
    return replace(bits, units=widened)


def squeeze(bits: Bits, units: Sequence[Unit], excess: int) -> Bits:
    """Return `bits` with half as many for the units that lose least, until `excess` bytes are gone.

    `units` are those of a sweep with half the bits.
    """
    narrowed = dict(bits.units)
    for unit in sorted(units, key=lambda unit: unit.divergence / unit.numbers):
        if excess <= 0:
            break
        narrowed[unit.name] = bits.usual // 2
        excess -= unit.numbers * bits.usual // 16
    return replace(bits, units=narrowed)


def _open(network: str, path: Path, weights: Mapping[str, Floats] | None = None) -> Network:
    needed = {"encoder": "pixel_values", "decoder": "input_ids"}[network]
    session = OnnxSession(
        path, needed, memory="kept" if network == "decoder" else "given back", weights=weights
    )
    return OnnxEncoder(session) if network == "encoder" else OnnxDecoder(session)


def _units(path: Path, bits: int) -> Iterator[tuple[str, dict[str, Floats]]]:
    """Yield each unit of a network with its matrices as they are after rounding."""
    model, weights = read_network(path)
    matrices: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            if weights[name].ndim == 2:
                matrices.setdefault(unit_of(name), []).append(name)
    for unit, names in matrices.items():
        yield unit, {name: _rounded(weights[name], bits) for name in dict.fromkeys(names)}


def _rounded(matrix: Floats, bits: int) -> Floats:
    rows = matrix.T  # MatMul holds [in, out]
    return np.ascontiguousarray(widen_rows(round_rows(rows, bits), rows.shape[1]).T)


def _foresee(
    decoder: Network, bridge: str, seen: Any, start: NDArray[np.int64], words: Any
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the logits [words, N, V] behind each of `words` [words, N], by default the likeliest.

    And those words.
    """
    given: Any = seen
    past, current = None, start
    logits, said = [], []
    for place in range(_WORDS):
        scores, past = decoder(input_ids=current, past_key_values=past, **{bridge: given})
        if bridge == "prefix_embeds":
            given = None  # the picture is in the cache now
        logits.append(scores)
        said.append(scores.argmax(-1) if words is None else words[place])
        current = said[-1][:, None]
    return np.stack(logits), np.stack(said)


def _divergence(expected: Floats, found: Floats) -> float:
    one, other = _log_softmax(expected), _log_softmax(found)
    return float((np.exp(one) * (one - other)).sum(-1).mean())


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return normalised
