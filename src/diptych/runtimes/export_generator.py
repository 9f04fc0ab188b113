"""Turn a generator's modules into an artifact: ONNX files that run without torch, and measured.

What decides is how far apart the pictures of both are; the tensors' distances are written down too.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx  # noqa: F401  (to say at once that it is missing)
import torch
from torch import nn

from diptych.errors import BadInput, QualityLoss
from diptych.runtimes.artifact import (
    SHARED_WEIGHTS,
    file_entry,
    network_entry,
    network_path,
    network_size,
    staged,
    versions,
    write_artifact,
    write_json,
)
from diptych.runtimes.generator_graphs import text_encoder_graph, unet_graph, unet_shallow_graph
from diptych.runtimes.graph import Graph, Weights, weights_file
from diptych.runtimes.network import OpenNetworks
from diptych.runtimes.on_onnxruntime import open_generator_files
from diptych.runtimes.on_torch_generator import generator_networks
from diptych.runtimes.picture_agreement import (
    Sketch,
    Words,
    compare_generators,
    compare_pictures,
    draw,
    sketch_for,
)
from diptych.runtimes.static_generator import (
    ROUNDED,
    describe_rounding,
    find_ranges,
    write_rounded,
)
from diptych.runtimes.static_quantize import Ranges
from diptych.runtimes.storage import check_precision, shrink
from diptych.runtimes.updates import updated
from diptych.runtimes.vae_graphs import vae_decoder_graph, vae_encoder_graph
from diptych.weights.diffusion import GeneratorFolder, copy_tokenizer, describe_generator
from diptych.weights.save_generator import save_generator

__all__ = ["PictureJudge", "add_edition", "export_generator", "write_networks"]

logger = logging.getLogger("diptych")

PictureJudge = Callable[[GeneratorFolder, GeneratorFolder], dict[str, Any]]
"""Compares a model with its export, before that has its name; {} where it has nothing to say."""

Configs = Mapping[str, Mapping[str, Any]]

# The autoencoder's errors are seen as they are, while the UNet's are smoothed by the steps that
# follow: it keeps half precision where the others are rounded to bytes.
_ROUNDED = ("text_encoder", "text_encoder_2", "unet", "unet_shallow")
_WANTED_DB = {"fp32": 60.0, "fp16": 40.0, "int8": 25.0, "int4": 15.0}
_LEAST_DB = {"fp32": 40.0, "fp16": 30.0, "int8": 18.0, "int4": 10.0}  # below, it is no export


def export_generator(
    modules: Mapping[str, nn.Module],
    model: GeneratorFolder,
    folder: str | Path,
    *,
    precision: str = "fp32",
    sketch: Sketch | None = None,
    calibration: Words | None = None,
    force: bool = False,
    checkpoint: bool = False,
    judge: PictureJudge | None = None,
) -> dict[str, Any]:
    """Write `modules` as an artifact to `folder`; return the content of its `export.json`.

    `model` says how words and noise are treated. `precision` is how weights are stored: "fp32",
    "fp16", "int8" or "int4"; all compute in float32. With the words of prompts as `calibration`
    the UNet of an int8 export multiplies in 8 bits, by the ranges seen while those are drawn.
    Pictures of both are compared as `sketch` says, or over seeded ones, and by `judge`. With
    `checkpoint` the folder holds the modules as a checkpoint of halves too, whose weights an fp16
    export shares. Raises `BadInput` for what cannot be exported or written, and `QualityLoss`
    where a picture is too far from torch's, unless `force`.
    """
    check_precision(precision)
    with _for_export(modules) as plain:
        configs = {name: _config(module) for name, module in plain.items()}
        sketch = sketch or sketch_for(configs)
        with staged(Path(folder)) as staging:
            ranges = None
            if calibration is not None:
                unet = unet_graph(configs["unet"], _weights(plain["unet"]))
                drawing = generator_networks(plain)
                ranges = find_ranges(unet, drawing, configs, model.schedule, calibration, staging)
            if checkpoint:
                save_generator(plain, model, staging, dtype="float16")
            files = write_networks(plain, staging, precision=precision, ranges=ranges)
            for name, tokenizer in model.tokenizers.items():
                copy_tokenizer(tokenizer, staging / name)
            source = {"name": model.name, "revision": model.revision}
            document = {
                "precision": precision,
                "family": model.family,
                "configs": configs,
                "schedule": dict(model.schedule),
                "defaults": dict(model.defaults),
                "force_zeros_for_empty_prompt": model.force_zeros_for_empty_prompt,
                "source": source,
            }
            write_artifact(staging, document, task="text-to-image", networks=[*files])
            report: dict[str, Any] = {
                "versions": versions("torch", "onnx", "onnxruntime", "numpy"),
                "source": source,
                precision: _compare(plain, files, configs, model.schedule, sketch),
            }
            if ranges is not None:
                report[precision]["rounding"] = describe_rounding(ranges)
            _check_bound(precision, report[precision]["pictures"], force)
            if judge is not None and (found := judge(model, describe_generator(staging))):
                report[precision]["judged"] = found
            write_json(staging / "export.json", report)
    _warn(folder, precision, report[precision]["pictures"])
    return report


def write_networks(
    modules: Mapping[str, nn.Module],
    folder: Path,
    *,
    precision: str = "fp32",
    ranges: Ranges | None = None,
) -> dict[str, Path]:
    """Write every network of `modules` to `folder`; return their files.

    With `ranges` the UNet's products are computed in 8 bits. Where the folder holds a checkpoint of
    the modules, networks in half precision share its weights.
    """
    writers: list[tuple[str, Callable[..., Graph]]] = [
        ("unet", unet_graph),
        ("unet", unet_shallow_graph),
        ("vae", vae_encoder_graph),
        ("vae", vae_decoder_graph),
    ]
    files = {}
    for name in ("text_encoder", "text_encoder_2"):
        if name in modules:
            weights = _weights(modules[name])
            graph = text_encoder_graph(_config(modules[name]), weights, name)
            files[name] = _write(graph, folder, precision, name)
    for name, write in writers:
        graph = write(_config(modules[name]), _weights(modules[name]))
        files[graph.name] = _write(graph, folder, precision, name, ranges)
    return files


def add_edition(
    unet: nn.Module, folder: Path, kind: str, lora: Path, defaults: Mapping[str, Any]
) -> None:
    """Let the artifact in `folder`, whose UNet is `unet`, have an edition with the LoRA in a file.

    Its network takes the weights of the artifact's own, so that it costs the bytes of the LoRA.
    """
    from diptych.models.lora import layers
    from diptych.weights.adapters import read_lora

    document = json.loads((folder / "artifact.json").read_text("utf-8"))
    paths = {id(layer): path for path, layer in layers(unet).items()}
    updates = {
        paths[id(layer)]: (update.down.flatten(1).numpy(), (update.up.flatten(1) * alpha).numpy())
        for layer, update, alpha in read_lora({"unet": unet}, lora)
    }
    name, weights_of = f"unet_{kind}", network_path(folder, "unet")
    with _for_export({"unet": unet}) as plain, staged(folder, adds=True) as staging:
        whole = unet_graph(_config(plain["unet"]), _weights(plain["unet"]))
        shared = folder / weights_file(weights_of)
        checkpoint = shared if shared.suffix == ".safetensors" else None
        small = shrink(whole, document["precision"], checkpoint)
        updated(small, name, updates).write(network_path(staging, name), weights_of)
        kept = Path(shutil.copyfile(lora, staging / f"{kind}.safetensors"))
        edition = {
            "networks": {"unet": network_entry(network_path(staging, name), folder)},
            "lora": file_entry(kept),
            "defaults": dict(defaults),
        }
        editions = {**document.get("editions", {}), kind: edition}
        write_json(staging / "artifact.json", {**document, "editions": editions})


def _write(
    graph: Graph, folder: Path, precision: str, part: str, ranges: Ranges | None = None
) -> Path:
    path = network_path(folder, graph.name)
    rounded = precision in ("int8", "int4")
    stored = "fp16" if rounded and graph.name not in _ROUNDED else precision
    checkpoint = _checkpoint(folder, part) if stored == "fp16" else None
    shared = SHARED_WEIGHTS.get(graph.name)
    weights_of = None if shared is None else network_path(folder, shared)
    if ranges is not None and graph.name in ROUNDED:
        write_rounded(graph, path, ranges, weights_of)
        return path
    shrink(graph, stored, checkpoint).write(path, weights_of, checkpoint)
    return path


def _checkpoint(folder: Path, part: str) -> Path | None:
    """Return the file with the weights of a module in `folder`, if there is one."""
    return next((folder / part).glob("*.safetensors"), None)


@contextmanager
def _for_export(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Give the modules, or copies of them, in evaluation mode, in float32 and on the CPU."""
    plain = {}
    trained = [module for module in modules.values() if module.training]
    for name, module in modules.items():
        tensors = [*module.state_dict().values()]
        if any(tensor.is_meta for tensor in tensors):
            raise BadInput(f"the {name} has no weights yet: load them first")
        wanted = (torch.device("cpu"), torch.float32)
        is_plain = all((each.device, each.dtype) == wanted for each in tensors)
        plain[name] = module if is_plain else copy.deepcopy(module).to(*wanted)
        plain[name].eval()
    try:
        yield plain
    finally:
        for module in trained:
            module.train()


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = module.config
    return dataclasses.asdict(config)


def _weights(module: nn.Module) -> Weights:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def _compare(
    modules: Mapping[str, nn.Module],
    files: Mapping[str, Path],
    configs: Configs,
    schedule: Mapping[str, Any],
    sketch: Sketch,
) -> dict[str, Any]:
    """Measure the ONNX files beside the modules: pictures, tensors and bytes."""
    ours = generator_networks(modules)
    theirs = OpenNetworks(
        open_generator_files(files, configs["unet"]),
        runtime="onnxruntime",
        device="cpu",
        dtype="float32",
        reason="compared",
    )
    worst = compare_generators(ours, theirs, configs, sketch)
    pictures = [draw(networks, configs, schedule, sketch) for networks in (ours, theirs)]
    networks = {
        name: {"max_abs_difference": worst[name], "bytes": network_size(path)}
        for name, path in files.items()
    }
    return {"pictures": compare_pictures(*pictures), "networks": networks}


def _check_bound(precision: str, pictures: Mapping[str, Any], force: bool) -> None:
    worst, least = pictures["worst_psnr_db"], _LEAST_DB[precision]
    if not worst >= least and not force:
        raise QualityLoss(
            f"a picture of the {precision} networks is at {worst:.1f} dB from torch's, the bound "
            f"is {least:.0f} dB: choose a wider precision, or force it"
        )


def _warn(folder: str | Path, precision: str, pictures: Mapping[str, Any]) -> None:
    worst = pictures["worst_psnr_db"]
    if worst < _WANTED_DB[precision]:
        logger.warning("%s: a picture is only at %.1f dB from torch's", folder, worst)
