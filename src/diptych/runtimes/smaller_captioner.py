"""Write a float32 captioner smaller, and say what that changed: words, tensors, bytes.

The matrices that bear rounding badly are found by a sweep and kept wider; what was chosen is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import BadInput, QualityLoss
from diptych.runtimes.agreement import (
    Pixels,
    compare_tensors,
    compare_tokens,
    greedy_tokens,
    pictures_for,
)
from diptych.runtimes.artifact import (
    NETWORKS,
    copy_tokenizer,
    network_path,
    network_size,
    staged,
    versions,
    write_artifact,
    write_json,
)
from diptych.runtimes.network import OpenNetworks, open_networks
from diptych.runtimes.quantize import Bits, bits_for, check_mode, quantize_network
from diptych.runtimes.sensitivity import Unit, spare, squeeze, sweep
from diptych.runtimes.static_quantize import calibrate, quantize_statically
from diptych.weights.files import ModelFolder, describe, verify

__all__ = [
    "Judge",
    "Shrinking",
    "check_bound",
    "check_size",
    "compare_artifacts",
    "quantize_captioner",
    "write_smaller",
]

Judge = Callable[[ModelFolder, ModelFolder], dict[str, Any]]
"""Compares a model with the smaller one that would replace it, before that has its name."""

# How much of the bytes the sweep may give back to the matrices that bear rounding badly.
_ROOM = {"int8": 0.1, "int4": 0.015}
_WANTED_IDENTICAL = 0.95  # of the captions of the user's pictures; int8 below it gets a sweep
_SHOWN = 12  # units of a sweep that the report names
# Bounds: the least share of identical captions on the user's pictures, and of tokens that agree
# on seeded ones, where every word of a captioner is a near tie.
_BOUNDS = {
    "fp32": (0.98, 0.8),
    "fp16": (0.98, 0.8),
    "int8": (_WANTED_IDENTICAL, 0.25),
    "int4": (0.3, 0.1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinking:
    """Say how a captioner is made smaller: `mode` is fp16, int8 or int4, None for not at all.

    Captions are compared over `images` [C, H, W], seeded ones where it is None. With `calibration`
    pictures int8 rounds what goes into the encoder's products by ranges seen on those. `most_bytes`
    presses the artifact under that size. `judge` compares both models before the smaller one has
    its name. One that changes more than its bound is refused, unless `force`.
    """

    mode: str | None = None
    images: Sequence[Pixels] | None = None
    calibration: Sequence[Pixels] | None = None
    most_bytes: int | None = None
    force: bool = False
    judge: Judge | None = None


def quantize_captioner(
    source: Path,
    folder: Path,
    mode: str = "int8",
    *,
    images: Sequence[Pixels] | None = None,
    calibration: Sequence[Pixels] | None = None,
    force: bool = False,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Write the artifact at `source`, which is left as it is, as a smaller one to `folder`.

    The other words are those of `Shrinking`. Returns the content of its `export.json`. Raises
    `BadInput` for another mode, or a source that is not float32, and `QualityLoss` where too few
    words stay the same, unless `force`.
    """
    check_mode(mode)
    wanted = Shrinking(mode=mode, images=images, calibration=calibration, force=force, judge=judge)
    model = describe(Path(source))
    verify(model)
    if not model.networks or model.precision != "fp32":
        found = f"is {model.precision}" if model.networks else "has no ONNX networks"
        raise BadInput(f"{model.name} {found}: give the folder of an fp32 artifact")
    with staged(Path(folder)) as staging:
        source_named = {"name": model.name, "revision": model.revision}
        report = {
            "versions": versions("onnxruntime", "onnx", "numpy"),
            mode: write_smaller(model, staging, source_named, wanted),
        }
        check_bound(report[mode], wanted)
        if judge is not None:
            report[mode]["judged"] = judge(model, describe(staging))
        write_json(staging / "export.json", report)
    return report


def write_smaller(
    model: ModelFolder, folder: Path, source: Mapping[str, Any], wanted: Shrinking
) -> dict[str, Any]:
    """Write the float32 artifact `model` smaller to `folder`; return how both compare.

    With calibration the encoder's products are int8 by fixed ranges; the decoder, which waits for
    memory rather than products, rounds as ever. With `most_bytes`, the matrices that bear it best
    go down to half the bits until it fits. Whether it keeps its bound is not asked here.
    """
    mode, images, calibration = wanted.mode, wanted.images, wanted.calibration
    assert mode is not None, "there is nothing to make smaller"
    pictures = pictures_for(model.config, model.preprocessing, images)
    bits, units = bits_for(mode), []
    _write(model, folder, mode, source, bits, calibration)
    if calibration is not None:
        report = compare_artifacts(model, describe(folder), pictures)
        return {**report, "calibrated_on": len(calibration)}
    report = compare_artifacts(model, describe(folder), pictures)
    tokens = report["tokens"]
    room = int(_ROOM.get(mode, 0) * _bytes(folder))
    excess = _bytes(folder) - (wanted.most_bytes or _bytes(folder))

    def rounded(bits: int) -> list[Unit]:
        return sweep(model.networks, pictures, model.config, model.generation, bits)

    if excess > 0:
        units = rounded(bits.usual // 2)
        bits = squeeze(bits, units, excess)
    elif mode == "int4" or (
        mode == "int8" and images is not None and _share(tokens) < _WANTED_IDENTICAL
    ):
        units = rounded(bits.usual)
        bits = spare(bits, units, room)
    if bits.units:
        _write(model, folder, mode, source, bits)
        report = compare_artifacts(model, describe(folder), pictures)
    report["bits"] = {"usual": bits.usual, "words": bits.words, "exceptions": dict(bits.units)}
    report["sweep"] = [
        {"unit": unit.name, "nats_a_word": unit.divergence, "numbers": unit.numbers}
        for unit in units[:_SHOWN]
    ]
    return report


def check_bound(report: Mapping[str, Any], wanted: Shrinking) -> None:
    """Raise `QualityLoss` where too few words of a smaller model are those of the model.

    On the user's own pictures identical captions count, on seeded ones tokens.
    """
    mode, own = wanted.mode or "", wanted.images is not None
    tokens, bound = report["tokens"], _BOUNDS[mode][0 if own else 1]
    found = _share(tokens) if own else tokens["agreeing"] / max(1, tokens["tokens"])
    if found < bound and not wanted.force:
        what = "captions are the same" if own else "words are the same on seeded pictures"
        raise QualityLoss(
            f"only {found:.0%} of the {what} in {mode}, the bound is {bound:.0%}: choose a "
            "wider precision, or force it"
        )


def check_size(folder: Path, wanted: Shrinking) -> None:
    """Raise `QualityLoss` for an artifact in `folder` that is larger than it may be."""
    if wanted.most_bytes is None or wanted.force or _bytes(folder) <= wanted.most_bytes:
        return
    raise QualityLoss(
        f"it has {_bytes(folder) / 1e6:.1f} MB as {wanted.mode}, and {wanted.most_bytes / 1e6:.1f} "
        "are allowed: choose int4 without calibration, fewer words, or force it"
    )


def compare_artifacts(
    source: ModelFolder, smaller: ModelFolder, images: Sequence[Pixels]
) -> dict[str, Any]:
    """Measure what rounding changed: words, tensors and bytes."""
    models = (source, smaller)
    before, after = (open_networks(model, "onnxruntime") for model in models)
    tokens = [_tokens(model, each, images) for model, each in ((source, before), (smaller, after))]
    worst = compare_tensors(before, after, images[0], source.config, source.generation)
    networks = {
        network: {
            "max_abs_difference": worst[network],
            "bytes": network_size(smaller.networks[network]),
            "bytes_before": network_size(source.networks[network]),
        }
        for network in NETWORKS
    }
    return {"tokens": compare_tokens(*tokens), "networks": networks}


def _tokens(
    model: ModelFolder, networks: OpenNetworks, images: Sequence[Pixels]
) -> list[list[int]]:
    return greedy_tokens(networks, images, model.config, model.generation)


def _write(
    model: ModelFolder,
    folder: Path,
    mode: str,
    source: Mapping[str, Any],
    bits: Bits,
    calibration: Sequence[Pixels] | None = None,
) -> None:
    for network in NETWORKS:
        path, target = model.networks[network], network_path(folder, network)
        if network == "encoder" and calibration is not None:
            ranges = calibrate(path, ({"pixel_values": each[None]} for each in calibration))
            quantize_statically(path, target, ranges)
        else:
            quantize_network(path, target, bits)
    copy_tokenizer(model.tokenizer, folder)
    document = {
        "precision": mode,
        "config": model.config,
        "preprocessing": model.preprocessing,
        "generation": model.generation,
        "source": dict(source),
    }
    write_artifact(folder, document)


def _share(tokens: Mapping[str, Any]) -> float:
    return float(tokens["identical"] / max(1, tokens["images"]))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
