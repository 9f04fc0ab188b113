"""Turn a captioner's modules into an artifact: ONNX files that run without torch, and measured.

What decides is whether both give the same words; how far the tensors are apart is written down too.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx  # noqa: F401  (to say at once that it is missing)
import torch

from diptych.errors import BadInput
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
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
from diptych.runtimes.captioner_graphs import decoder_graph, encoder_graph
from diptych.runtimes.network import open_networks
from diptych.runtimes.on_torch import faster, torch_networks, twin
from diptych.runtimes.quantize import check_mode, compare_artifacts, quantize_network
from diptych.weights.files import describe
from diptych.weights.save import describe_config

__all__ = ["export_captioner"]

logger = logging.getLogger("diptych")


def export_captioner(
    module: VisionEncoderDecoder,
    folder: str | Path,
    *,
    preprocessing: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Path,
    source: Mapping[str, Any],
    images: Sequence[Pixels] | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Write `module` as an artifact to `folder`; return the content of its `export.json`.

    Captions of both are compared over `images` [C, H, W], or over seeded ones. `quantize` is None
    or "int8". Raises `BadInput` for what cannot be exported or written.
    """
    if quantize is not None:
        check_mode(quantize)
    module = _for_export(module)
    config = describe_config(module)
    images = pictures_for(config, preprocessing, images)
    document = {
        "config": config,
        "preprocessing": dict(preprocessing),
        "generation": dict(generation),
        "source": dict(source),
    }
    with staged(Path(folder)) as staging:
        plain = staging if quantize is None else staging / "fp32"
        plain.mkdir(exist_ok=True)
        _write_networks(module, config, plain)
        copy_tokenizer(Path(tokenizer), plain)
        write_artifact(plain, {"precision": "fp32", **document})
        report = {
            "versions": versions("torch", "onnx", "onnxruntime", "numpy"),
            "source": dict(source),
            "fp32": _compare(module, plain, images),
        }
        if quantize is not None:
            for network in NETWORKS:
                quantize_network(network_path(plain, network), network_path(staging, network))
            copy_tokenizer(Path(tokenizer), staging)
            write_artifact(staging, {"precision": quantize, **document})
            report[quantize] = compare_artifacts(plain, staging, images)
            for path in plain.iterdir():
                path.unlink()
            plain.rmdir()
        write_json(staging / "export.json", report)
    _warn(folder, report["fp32"]["tokens"])
    return report


def _for_export(module: VisionEncoderDecoder) -> VisionEncoderDecoder:
    """Return the module, or its twin, in evaluation mode, in float32 and on the CPU."""
    tensors = module.state_dict().values()
    if any(tensor.is_meta for tensor in tensors):
        raise BadInput("the captioner has no weights yet: load them first")
    plain = (torch.device("cpu"), torch.float32)
    if any((each.device, each.dtype) != plain for each in tensors if each.is_floating_point()):
        return faster(copy.deepcopy(module).eval().to("cpu", torch.float32))
    return faster(twin(module).eval())


def _write_networks(module: VisionEncoderDecoder, config: Mapping[str, Any], folder: Path) -> None:
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    for write in (encoder_graph, decoder_graph):
        graph = write(config, weights)
        graph.write(network_path(folder, graph.name))


def _compare(
    module: VisionEncoderDecoder, folder: Path, images: Sequence[Pixels]
) -> dict[str, Any]:
    """Measure the artifact in `folder` beside the module: words, tensors and bytes."""
    model = describe(folder)
    ours, theirs = torch_networks(module), open_networks(model, "onnxruntime")
    config, generation = model.config, model.generation
    tokens = [greedy_tokens(each, images, config, generation) for each in (ours, theirs)]
    worst = compare_tensors(ours, theirs, images[0], config, generation)
    networks = {
        network: {
            "max_abs_difference": worst[network],
            "bytes": network_size(model.networks[network]),
        }
        for network in NETWORKS
    }
    return {"tokens": compare_tokens(*tokens), "networks": networks}


def _warn(folder: str | Path, tokens: Mapping[str, Any]) -> None:
    if tokens["identical"] < tokens["images"]:
        logger.warning(
            "%s: only %d of %d captions are those of torch: see its export.json",
            *(folder, tokens["identical"], tokens["images"]),
        )
