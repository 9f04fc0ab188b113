"""Write a generator as diffusers writes it, or as a single file: the same tables backwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.errors import BadInput
from diptych.weights.dialects import clip_text, diffusers_unet, diffusers_vae, scheduler
from diptych.weights.generator_files import GeneratorFolder
from diptych.weights.layouts import components
from diptych.weights.save_module import (
    Written,
    as_target,
    dtype_name,
    forget_artifact,
    staged,
    write_file,
    write_tensors,
)
from diptych.weights.tokenizer_files import copy_tokenizer

__all__ = ["describe_configs", "save_generator"]

_DIFFUSERS = "0.36.0"  # the oldest that is known to read what is written here
_SD2_BASE_STEPS = 875_000
_LAYOUTS = ("diffusers", "ldm")


def save_generator(
    modules: Mapping[str, nn.Module],
    model: GeneratorFolder,
    path: str | Path,
    *,
    layout: str = "diffusers",
    dtype: str | torch.dtype | None = None,
) -> None:
    """Write `modules` and all that goes with them to `path`.

    `model` says how words and noise are treated. `layout` "diffusers" writes a folder that
    diffusers loads, "ldm" a single .safetensors, which carries no tokenizer and little of the
    schedule. `dtype` None keeps the modules'. A new folder appears whole; in one that exists, each
    file is replaced whole. Raises `BadInput` where it cannot be written.
    """
    if layout not in _LAYOUTS:
        raise BadInput(f"layout is {layout!r}: give {' or '.join(_LAYOUTS)}.")
    path, target = Path(path), as_target(dtype)
    configs = describe_configs(modules)
    states = {name: dict(module.state_dict()) for name, module in modules.items()}
    try:
        if layout == "ldm":
            _write_single_file(path, states, configs, model, target)
        else:
            with staged(path) as staging:
                _write_folder(staging, states, configs, model, target)
                forget_artifact(path)
    except OSError as error:
        needed = sum(t.nbytes for state in states.values() for t in state.values()) >> 20
        raise BadInput(
            f"{path} cannot be written: {error.strerror or error}. About {needed} MB are needed: "
            "make room, or give another place."
        ) from error


def describe_configs(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return the modules' configs as a `GeneratorFolder` holds them."""
    checks = {"unet": diffusers_unet.check_config, "vae": diffusers_vae.check_config}
    found = {}
    for name, module in modules.items():
        config: Any = module.config
        found[name] = checks.get(name, clip_text.check_config)(dataclasses.asdict(config))
    return found


# --- diffusers ------------------------------------------------------------------------------------


def _write_folder(
    folder: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, dict[str, Any]],
    model: GeneratorFolder,
    target: torch.dtype | None,
) -> None:
    for part in components("diffusers", model.family, configs):
        inside = folder / part.name
        inside.mkdir()
        is_text = part.name.startswith("text_encoder")
        file = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        state = states[part.name]
        write_tensors(inside / file, [Written(part.dialect, state)], target)
        document = _document(part.name, configs[part.name])
        if is_text:
            document["torch_dtype"] = dtype_name(target or next(iter(state.values())).dtype)
        _write_json(inside / "config.json", document)
    for name, files in model.tokenizers.items():
        copy_tokenizer(files, folder / name)
    (folder / "scheduler").mkdir()
    noise = {**scheduler.write_config(model.schedule), "_diffusers_version": _DIFFUSERS}
    _write_json(folder / "scheduler" / "scheduler_config.json", noise)
    _write_json(folder / "model_index.json", _index(configs, model, noise["_class_name"]))


def _document(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if name.startswith("text_encoder"):
        return clip_text.write_config(config)
    write = diffusers_unet.write_config if name == "unet" else diffusers_vae.write_config
    return {**write(config), "_diffusers_version": _DIFFUSERS}


def _index(
    configs: Mapping[str, Mapping[str, Any]], model: GeneratorFolder, scheduler_name: str
) -> dict[str, Any]:
    is_xl = "text_encoder_2" in configs
    document: dict[str, Any] = {
        "_class_name": _pipeline(configs["unet"], is_xl),
        "_diffusers_version": _DIFFUSERS,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler_name],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for name, config in configs.items():
        if name.startswith("text_encoder"):
            has_projection = config["projection_dim"] is not None
            tower = "CLIPTextModelWithProjection" if has_projection else "CLIPTextModel"
            document[name] = ["transformers", tower]
            document[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if is_xl:
        document["force_zeros_for_empty_prompt"] = model.force_zeros_for_empty_prompt
    else:
        document |= {"safety_checker": [None, None], "requires_safety_checker": False}
    if model.family == "diptych":
        document["_diptych"] = {"family": model.family, "defaults": dict(model.defaults)}
    return document


def _pipeline(unet: Mapping[str, Any], is_xl: bool) -> str:
    if unet["time_cond_proj_dim"] is not None and not is_xl:
        return "LatentConsistencyModelPipeline"
    kind = "Inpaint" if unet["in_channels"] == 9 else ""
    return f"StableDiffusion{'XL' * is_xl}{kind}Pipeline"


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


# --- single file ----------------------------------------------------------------------------------


def _write_single_file(
    path: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, dict[str, Any]],
    model: GeneratorFolder,
    target: torch.dtype | None,
) -> None:
    if model.family == "diptych":
        raise BadInput("a generator of diptych's own has no single file: save it as diffusers.")
    if path.suffix != ".safetensors" or path.is_dir():
        raise BadInput(f"{path}: give a file name that ends in .safetensors.")
    parts = components("ldm", model.family, configs)
    networks = [Written(part.dialect, states[part.name], part.prefix) for part in parts]
    with staged(path.parent) as staging:
        write_tensors(staging / path.name, networks, target, _marks(model))


def _marks(model: GeneratorFolder) -> dict[str, Tensor]:
    """Return what tells readers the prediction type: nothing else in a single file does."""
    predicts = model.schedule["prediction_type"]
    marks: dict[str, Tensor] = {}
    if model.family == "sd2" and predicts == "epsilon":
        marks["global_step"] = torch.tensor(_SD2_BASE_STEPS)
    elif model.family != "sd2" and predicts == "v_prediction":
        marks["v_pred"] = torch.zeros(0)
    if model.schedule["rescale_betas_zero_snr"]:
        marks["ztsnr"] = torch.zeros(0)
    return marks
