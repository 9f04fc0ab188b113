"""Say what a generator on disk is: a diffusers folder, a single file, or an artifact of ours.

No tensor is read, and torch is not needed. Families are told by names and shapes, not by what a
file or its folder is called.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.errors import BadInput, UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.weights.dialects import clip_text, diffusers_unet, diffusers_vae, scheduler
from diptych.weights.files import (
    check_artifact,
    contents,
    editions_in,
    networks_of,
    object_in,
    precision_of,
    read_document,
    shards_of,
    stated_file,
)
from diptych.weights.single_file import read_single_file, sniff
from diptych.weights.tokenizer_files import TokenizerFiles, find_tokenizer

__all__ = [
    "FAMILIES",
    "GeneratorEdition",
    "GeneratorFolder",
    "TokenizerFiles",
    "describe_generator",
    "weight_names",
]

FAMILIES = ("sd1", "sd2", "sdxl", "diptych")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_TASK = "text-to-image"
_VARIANT = re.compile(r"[A-Za-z0-9_]{1,32}")
_NETWORKS = frozenset({"text_encoder", "unet", "vae_encoder", "vae_decoder"})
# Component → what its files are called before the ending.
_STEMS = {"unet": ("diffusion_pytorch_model",) * 2, "vae": ("diffusion_pytorch_model",) * 2}
_TEXT_STEMS = ("model", "pytorch_model")  # of safetensors, of pickles
_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "text_encoder": clip_text.check_config,
    "text_encoder_2": clip_text.check_config,
    "unet": diffusers_unet.check_config,
    "vae": diffusers_vae.check_config,
}


@dataclass(frozen=True, slots=True)
class GeneratorEdition:
    """Describe a generator that differs from the one in whose folder it is by a LoRA."""

    networks: Mapping[str, Path]  # its own ONNX files, the LoRA in them
    lora: Path
    defaults: Mapping[str, Any]  # what it prefers


@dataclass(frozen=True, slots=True)
class GeneratorFolder:
    """Describe a generator on disk: everything but the tensors, checked and in our words."""

    path: Path  # a folder, or a single file
    name: str  # what the user asked for
    revision: str | None  # the commit it was fetched from, where it comes from the hub
    family: str  # one of FAMILIES
    configs: Mapping[str, Mapping[str, Any]]  # by network: the fields of our config dataclasses
    schedule: Mapping[str, Any]  # the fields of ScheduleConfig
    tokenizers: Mapping[str, TokenizerFiles]  # "tokenizer", for SDXL "tokenizer_2" too
    weights: Mapping[str, tuple[Path, ...]]  # by network, of a single file the same for all
    layout: str  # of the weights: "diffusers" or "ldm"
    networks: Mapping[str, Path]  # the ONNX files of the artifact by network, {} if none
    precision: str | None  # of the artifact: "fp32", "fp16", "int8"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the model prefers
    force_zeros_for_empty_prompt: bool = False  # zeros stand for a negative prompt left out
    lora: Path | None = None  # added to the weights as they are loaded
    editions: Mapping[str, GeneratorEdition] = field(default_factory=dict)

    def edition(self, kind: str, name: str) -> GeneratorFolder:
        """Return the edition of a `kind`, under a name of its own; `UnknownModel` for none."""
        if kind not in self.editions:
            raise UnknownModel(f"{self.name} has no edition {kind!r}.")
        found = self.editions[kind]
        # A network that shares the weights of one that is replaced would not fit it.
        kept = {key: path for key, path in self.networks.items() if key != "unet_shallow"}
        return dataclasses.replace(
            self,
            name=name,
            networks={**kept, **found.networks} if self.networks else {},
            defaults={**self.defaults, **found.defaults},
            lora=found.lora,
            editions={},
        )


def describe_generator(
    path: str | Path,
    name: str | None = None,
    revision: str | None = None,
    *,
    prediction_type: str | None = None,
    num_attention_heads: Sequence[int] | None = None,
    variant: str | None = None,
) -> GeneratorFolder:
    """Say what generator `path`, a folder or a single file, holds; no tensor is read.

    `name` is for messages and stays with the model. `prediction_type` overrules what the checkpoint
    says or lets guess. `num_attention_heads` is for single files of other than published sizes, one
    number a level. `variant` ("fp16") prefers files of that name in a diffusers folder. Of a folder
    that holds an artifact too, the artifact says how words and noise are treated. Raises
    `UnknownModel` where there is no generator, `UnsupportedModel` for one of another kind,
    `WeightsMismatch` where files are missing.
    """
    path = Path(path)
    name = str(path) if name is None else name
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise BadInput(
            f"prediction_type is {prediction_type!r}: give {', '.join(PREDICTION_TYPES)}."
        )
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise BadInput(f"variant is {variant!r}: give a word such as 'fp16'.")
    try:
        if path.is_file():
            return _describe_file(path, name, revision, prediction_type, num_attention_heads)
        _check_folder(path, name)
        if (path / "artifact.json").is_file():
            return _describe_artifact(path, name, revision, variant)
        return _describe_folder(path, name, revision, prediction_type, variant)
    except OSError as error:
        raise UnknownModel(f"{name} cannot be opened: {error.strerror or error}.") from error
    except (UnsupportedModel, WeightsMismatch) as error:
        text = str(error).rstrip(".")
        raise type(error)(text if text.startswith(name) else f"{name}: {text}.") from error


def _check_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise UnknownModel(f"{name} does not exist.")
    marks = ("artifact.json", "model_index.json", "unet/config.json")
    if any((folder / mark).is_file() for mark in marks):
        return
    if (folder / "config.json").is_file():
        raise UnsupportedModel("it is a single network or a captioner, not a generator")
    raise UnknownModel(
        f"{name} has no model_index.json or artifact.json ({contents(folder)}): give the folder of "
        "a diffusers pipeline, a single .safetensors or .ckpt file, or a generator that diptych "
        "exported."
    )


# --- single file ----------------------------------------------------------------------------------


def _describe_file(
    path: Path,
    name: str,
    revision: str | None,
    prediction_type: str | None,
    num_attention_heads: Sequence[int] | None,
) -> GeneratorFolder:
    stored, numbers = read_single_file(path)
    found = sniff(
        stored,
        numbers,
        prediction_type=prediction_type,
        num_attention_heads=num_attention_heads,
    )
    return GeneratorFolder(
        path=path,
        name=name,
        revision=revision,
        family=found.family,
        configs=found.configs,
        schedule=found.schedule,
        tokenizers=found.tokenizers,
        weights=dict.fromkeys(found.configs, (path,)),
        layout="ldm",
        networks={},
        precision=None,
        defaults=_defaults(found.configs),
        force_zeros_for_empty_prompt=found.family == "sdxl",
    )


# --- diffusers folder -----------------------------------------------------------------------------


def _describe_folder(
    folder: Path,
    name: str,
    revision: str | None,
    prediction_type: str | None,
    variant: str | None,
) -> GeneratorFolder:
    index = read_document(folder, "model_index.json", missing=None) or {}
    _check_index(folder, index)
    unet = diffusers_unet.read_config(_config(folder, "unet"))
    is_xl = unet["addition_time_embed_dim"] is not None
    texts = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    wanted = ["text_encoder", "text_encoder_2"] if is_xl else ["text_encoder"]
    if texts != wanted:
        raise UnsupportedModel(
            f"its UNet wants {' and '.join(wanted)}, and the folder has "
            f"{' and '.join(texts) or 'neither'}"
        )
    configs: dict[str, dict[str, Any]] = {name: _text(folder, name, is_xl) for name in texts}
    configs |= {"unet": unet, "vae": diffusers_vae.read_config(_config(folder, "vae"))}
    _check_widths(configs)
    own = index.get("_diptych") if isinstance(index.get("_diptych"), dict) else {}
    # diffusers writes "lambda_min_clipped": -Infinity for its DPM-Solvers.
    document = read_document(folder / "scheduler", "scheduler_config.json", infinite=True)
    schedule = scheduler.read_config(document, is_xl=is_xl)
    if prediction_type is not None:
        schedule["prediction_type"] = prediction_type
    return GeneratorFolder(
        path=folder,
        name=name,
        revision=revision,
        family=_family(own, configs),
        configs=configs,
        schedule=schedule,
        tokenizers=_tokenizers(folder, texts),
        weights=_weights(folder, configs, variant),
        layout="diffusers",
        networks={},
        precision=None,
        defaults={**_defaults(configs), **_stated_defaults(own)},
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", is_xl)),
    )


def _check_index(folder: Path, index: Mapping[str, Any]) -> None:
    if index.get("requires_aesthetics_score"):
        raise UnsupportedModel(
            "it is the refiner of Stable Diffusion XL, which diptych does not run: give the base"
        )
    for part in ("unet", "vae", "text_encoder"):
        if (folder / part / "config.json").is_file():
            continue
        kind = repr(index.get("_class_name", "pipeline"))[:60]
        if (folder / "text_encoder_2").is_dir() and part == "text_encoder":
            raise UnsupportedModel(
                f"the {kind} has its second text encoder only, as the refiner of Stable Diffusion "
                "XL: diptych runs the base"
            )
        if (folder / "transformer").is_dir():
            raise UnsupportedModel(f"a {kind} is another kind of generator, which is not built")
        raise WeightsMismatch(f"the {kind} has no {part}/config.json: fetch the model anew.")


def _config(folder: Path, part: str) -> Any:
    return read_document(folder / part, "config.json")


def _text(folder: Path, part: str, is_xl: bool) -> dict[str, Any]:
    document = _config(folder, part)
    towers = document.get("architectures")
    # Files without the word are of the class that this place of the pipeline has.
    default = "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"
    tower = towers[0] if isinstance(towers, list) and towers else default
    return clip_text.read_config(
        document, has_projection=tower == "CLIPTextModelWithProjection", is_xl=is_xl
    )


def _check_widths(configs: Mapping[str, Mapping[str, Any]]) -> None:
    texts = [config for part, config in configs.items() if part.startswith("text_encoder")]
    width = sum(config["hidden_size"] for config in texts)
    if width != configs["unet"]["cross_attention_dim"]:
        raise UnsupportedModel(
            f"its text encoders give {width} numbers a word, and its UNet takes "
            f"{configs['unet']['cross_attention_dim']}"
        )
    given, wanted = configs["unet"]["out_channels"], configs["vae"]["latent_channels"]
    if given != wanted:
        raise UnsupportedModel(
            f"its UNet gives {given} channels, and its autoencoder has {wanted} of latents"
        )


def _family(own: Any, configs: Mapping[str, Mapping[str, Any]]) -> str:
    if isinstance(own, dict) and own.get("family") == "diptych":
        return "diptych"
    if configs["unet"]["addition_time_embed_dim"] is not None:
        return "sdxl"
    return "sd2" if configs["unet"]["use_linear_projection"] else "sd1"


def _stated_defaults(own: Any) -> dict[str, Any]:
    stated = own.get("defaults") if isinstance(own, dict) else None
    return dict(stated) if isinstance(stated, dict) else {}


def _defaults(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    unet, vae = configs["unet"], configs["vae"]
    scale = vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)
    side = unet["sample_size"] * scale
    found: dict[str, Any] = {"width": side, "height": side}
    if unet["addition_time_embed_dim"] is not None:
        found["guidance_scale"] = 5.0
    if unet["time_cond_proj_dim"] is not None:  # latent consistency: distilled to a few steps
        found |= {"num_inference_steps": 4, "guidance_scale": 8.0}
    return found


def _tokenizers(folder: Path, texts: Sequence[str]) -> dict[str, TokenizerFiles]:
    names = [text.replace("text_encoder", "tokenizer") for text in texts]
    return {name: find_tokenizer(folder / name) for name in names}


def _weights(
    folder: Path, parts: Mapping[str, Any], variant: str | None
) -> dict[str, tuple[Path, ...]]:
    """Return the files of each network; {} where the folder has none at all."""
    found = {part: _files(folder / part, part, variant) for part in parts}
    missing = [part for part, files in found.items() if not files]
    if missing and len(missing) < len(found):
        raise WeightsMismatch(
            f"{missing[0]}/ has no weights ({contents(folder / missing[0])}): fetch the model anew."
        )
    return {} if missing else found


def _files(folder: Path, part: str, variant: str | None) -> tuple[Path, ...]:
    chosen = weight_names([path.name for path in folder.iterdir()], part, variant)
    if not chosen:
        return ()
    if chosen[0].endswith(".json"):
        return shards_of(folder, chosen[0])
    return (folder / chosen[0],)


def weight_names(names: Collection[str], part: str, variant: str | None) -> tuple[str, ...]:
    """Choose the weights of a network among the files beside its config: one file, or an index.

    Safetensors come first, halves or the only variant where there is nothing else, unless `variant`
    asks for one.
    """
    variants = dict.fromkeys([variant, None, "fp16"] if variant else [None, "fp16"])
    for stem, ending in zip(_STEMS.get(part, _TEXT_STEMS), ("safetensors", "bin"), strict=True):
        for each in variants:
            dotted = f".{each}" if each else ""
            for name in (
                f"{stem}{dotted}.{ending}",
                f"{stem}.{ending}.index{dotted}.json",
                f"{stem}{dotted}.{ending}.index.json",
            ):
                if name in names:
                    return (name,)
        others = [
            name
            for name in names
            if name.startswith(f"{stem}.") and name.count(".") == 2 and name.endswith(f".{ending}")
        ]
        if len(others) == 1:  # a variant that nobody asked for, and all there is
            return (others[0],)
    return ()


# --- artifact -------------------------------------------------------------------------------------


def _describe_artifact(
    folder: Path, name: str, revision: str | None, variant: str | None
) -> GeneratorFolder:
    document = read_document(folder, "artifact.json")
    check_artifact(document, _TASK)
    stated = object_in(document, "configs")
    texts = [part for part in ("text_encoder", "text_encoder_2") if part in stated]
    parts = [*texts, "unet", "vae"]
    if sorted(stated) != sorted(parts) or not texts:
        raise UnsupportedModel("artifact.json does not describe a text encoder, a UNet and a VAE")
    configs = {part: _CHECKS[part](object_in(stated, part)) for part in parts}
    _check_widths(configs)
    has_checkpoint = (folder / "unet").is_dir()
    return GeneratorFolder(
        path=folder,
        name=name,
        revision=revision,
        family=_stated_family(document, configs),
        configs=configs,
        schedule=scheduler.check_config(object_in(document, "schedule")),
        tokenizers=_tokenizers(folder, texts),
        weights=_weights(folder, configs, variant) if has_checkpoint else {},
        layout="diffusers",
        networks=networks_of(
            *(folder, object_in(document, "networks"), _NETWORKS | frozenset(texts)),
            optional=frozenset({"unet_shallow"}),
        ),
        precision=precision_of(document.get("precision")),
        defaults={**_defaults(configs), **_stated_defaults(document)},
        force_zeros_for_empty_prompt=document.get("force_zeros_for_empty_prompt") is True,
        editions={kind: _edition(folder, each) for kind, each in editions_in(document).items()},
    )


def _edition(folder: Path, entry: Mapping[str, Any]) -> GeneratorEdition:
    return GeneratorEdition(
        networks=networks_of(folder, object_in(entry, "networks"), frozenset({"unet"})),
        lora=stated_file(folder, "LoRA", entry.get("lora")),
        defaults=_stated_defaults(entry),
    )


def _stated_family(document: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> str:
    family = document.get("family")
    if family is None:
        return _family({}, configs)
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"artifact.json is of the family {repr(family)[:40]}; diptych knows "
            f"{', '.join(FAMILIES)}"
        )
    return str(family)
