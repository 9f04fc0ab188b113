"""Turn a captioner's modules into an artifact: ONNX files that run without torch, and measured.

What decides is whether both give the same words; how far the tensors are apart is written down too.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from diptych.runtimes.captioner_graphs import decoder_graph, encoder_graph, num_image_tokens
from diptych.runtimes.graph import Weights
from diptych.runtimes.network import open_networks
from diptych.runtimes.on_torch import faster, torch_networks, twin
from diptych.runtimes.quantize import check_mode
from diptych.runtimes.smaller_captioner import Shrinking, check_bound, check_size, write_smaller
from diptych.runtimes.vocabulary import (
    cut_generation,
    cut_weights,
    kept_tokens,
    write_tokenizer,
)
from diptych.weights.files import ModelFolder, describe, object_in, read_document
from diptych.weights.save import describe_config

__all__ = ["Belongings", "export_captioner"]

logger = logging.getLogger("diptych")

_CAPTION_POSITIONS = 128  # words of the longest caption that a cut model writes
_POSITIONS = "decoder.wpe.weight"


@dataclass(frozen=True, slots=True)
class Belongings:
    """Hold what a captioner has beside its weights; `source` is its name and revision."""

    preprocessing: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Path
    source: Mapping[str, Any]


def export_captioner(
    module: VisionEncoderDecoder,
    folder: str | Path,
    belongings: Belongings,
    wanted: Shrinking | None = None,
    *,
    words: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write `module` as an artifact to `folder`; return the content of its `export.json`.

    It is made smaller as `wanted` says, whose judge compares it with the float32 model. With
    `words` the vocabulary is cut to the tokens that they need, and the positions to those of a
    caption. Raises `BadInput` for what cannot be exported or written, and `QualityLoss` where
    quantizing changes more than its bound, unless forced.
    """
    wanted = wanted or Shrinking()
    if wanted.mode is not None:
        check_mode(wanted.mode)
    module = _for_export(module)
    config = describe_config(module)
    pictures = pictures_for(config, belongings.preprocessing, wanted.images)
    with staged(Path(folder)) as staging:
        plain = staging if wanted.mode is None and words is None else staging / "fp32"
        plain.mkdir(exist_ok=True)
        weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
        _write_plain(weights, config, belongings, plain)
        report = {
            "versions": versions("torch", "onnx", "onnxruntime", "numpy"),
            "source": dict(belongings.source),
            "fp32": _compare(module, plain, pictures),
        }
        check_bound(report["fp32"], replace(wanted, mode="fp32"))
        source_of_small = plain
        if words is not None:
            source_of_small = staging / "cut" if wanted.mode else staging
            report["vocabulary"] = _write_cut(
                weights, describe(plain), source_of_small, words, pictures
            )
        if wanted.mode is not None:
            small = write_smaller(describe(source_of_small), staging, belongings.source, wanted)
            report[wanted.mode] = small
            check_bound(small, wanted)
            check_size(staging, wanted)
            if wanted.judge is not None:
                small["judged"] = wanted.judge(describe(plain), describe(staging))
        for made in {plain, source_of_small} - {staging}:
            shutil.rmtree(made)
        write_json(staging / "export.json", report)
    _warn(folder, report["fp32"]["tokens"])
    return report


def _write_plain(
    weights: Weights, config: Mapping[str, Any], belongings: Belongings, folder: Path
) -> None:
    """Write the float32 artifact to `folder`."""
    _write_networks(weights, config, folder)
    copy_tokenizer(Path(belongings.tokenizer), folder)
    document = {
        "precision": "fp32",
        "config": config,
        "preprocessing": dict(belongings.preprocessing),
        "generation": dict(belongings.generation),
        "source": dict(belongings.source),
    }
    write_artifact(folder, document)


def _write_cut(
    weights: Weights,
    model: ModelFolder,
    folder: Path,
    words: Sequence[str],
    images: Sequence[Pixels],
) -> dict[str, Any]:
    """Write `model`, whose module holds `weights`, with the tokens that `words` need; compare."""
    folder.mkdir(exist_ok=True)
    kept = kept_tokens(
        *(model.tokenizer, model.generation, words), model.config["decoder"]["vocab_size"]
    )
    positions = int(model.config["decoder"]["max_position_embeddings"])
    needed = _CAPTION_POSITIONS
    if model.config["bridge"] == "prefix":
        needed += num_image_tokens(model.config["encoder"])
    positions = min(positions, needed)
    cut = cut_weights(weights, kept)
    cut[_POSITIONS] = cut[_POSITIONS][:positions]
    changed = {"vocab_size": len(kept), "max_position_embeddings": positions}
    config = {**model.config, "decoder": {**model.config["decoder"], **changed}}
    _write_networks(cut, config, folder)
    write_tokenizer(model.tokenizer, folder / "tokenizer.json", kept)
    document = {
        "precision": "fp32",
        "config": config,
        "preprocessing": dict(model.preprocessing),
        "generation": cut_generation(model.generation, kept),
        "source": object_in(read_document(model.path, "artifact.json"), "source"),
    }
    write_artifact(folder, document)
    smaller = describe(folder)
    before = greedy_tokens(
        open_networks(model, "onnxruntime"), images, model.config, model.generation
    )
    after = greedy_tokens(
        open_networks(smaller, "onnxruntime"), images, smaller.config, smaller.generation
    )
    named = [[int(kept[token]) for token in caption] for caption in after]
    return {
        "kept": len(kept),
        "of": int(model.config["decoder"]["vocab_size"]),
        "positions": positions,
        "tokens": compare_tokens(before, named),
    }


def _for_export(module: VisionEncoderDecoder) -> VisionEncoderDecoder:
    """Return the module, or its twin, in evaluation mode, in float32 and on the CPU."""
    tensors = module.state_dict().values()
    if any(tensor.is_meta for tensor in tensors):
        raise BadInput("the captioner has no weights yet: load them first")
    plain = (torch.device("cpu"), torch.float32)
    if any((each.device, each.dtype) != plain for each in tensors if each.is_floating_point()):
        return faster(copy.deepcopy(module).eval().to("cpu", torch.float32))
    return faster(twin(module).eval())


def _write_networks(weights: Weights, config: Mapping[str, Any], folder: Path) -> None:
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
