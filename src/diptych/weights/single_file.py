"""Say what is in a single file of Stable Diffusion: family and configs, from names and shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UnsupportedModel, WeightsMismatch
from diptych.text import END_OF_TEXT
from diptych.weights.dialects import clip_text, diffusers_unet, diffusers_vae, scheduler
from diptych.weights.dialects.ldm_file import PREFIXES, UNET, VAES, family_of
from diptych.weights.files import read_tensors
from diptych.weights.layouts import unused_layer
from diptych.weights.pickles import LEGACY_START, read_training_pickle
from diptych.weights.tensors import FETCH_ANEW, StoredTensor, read_number
from diptych.weights.tokenizer_files import CLIP_MERGES, CLIP_VOCABULARY, TokenizerFiles

__all__ = ["SingleFile", "read_single_file", "sniff"]

logger = logging.getLogger("diptych")

_HEAD_SIZE = 64  # of every published tower, and of the UNets of SD 2 and XL
_SD1_HEADS = 8  # at every level
_SD2_BASE_STEPS = 875_000  # after which Stable Diffusion 2 (base, epsilon) was saved
_SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}

# Names that tell what else a file is.
_OTHERS = (
    (r"(lora_unet_|lora_te).*|.*\.lora_(A|B|up|down)\..*", "a LoRA: load it with load_lora"),
    (r"emb_params|string_to_param|clip_l", "an embedding: load it with load_textual_inversion"),
    (r"control_model\..*|controlnet_.*", "a ControlNet"),
    (r".*joint_blocks\.0\..*|.*double_blocks\.0\..*", "another kind of generator (SD 3 or FLUX)"),
    (r"(down|up)_blocks\.0\..*", "one network of a diffusers folder: give the folder"),
    (r"(encoder|decoder)\.(down|up)(_blocks)?\.0\..*", "an autoencoder only"),
)


@dataclass(frozen=True, slots=True)
class SingleFile:
    """Describe a single file: the fields of a `GeneratorFolder` that come from it."""

    family: str
    configs: dict[str, dict[str, Any]]
    schedule: dict[str, Any]
    tokenizers: dict[str, TokenizerFiles]


def read_single_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, float]]:
    """Return where the tensors of a `.safetensors` or `.ckpt` lie, and the numbers beside them."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY_START))
    except OSError as error:
        raise WeightsMismatch(f"{path} cannot be read: {error.strerror or error}.") from error
    if start.startswith((b"PK\x03\x04", LEGACY_START)):
        return read_training_pickle(path)
    return read_tensors(path), {}


def sniff(
    stored: Mapping[str, StoredTensor],
    numbers: Mapping[str, float],
    *,
    prediction_type: str | None = None,
    num_attention_heads: Sequence[int] | None = None,
) -> SingleFile:
    """Tell the family and the configs from the names and shapes of the tensors.

    The heads of the UNet's attention leave no trace in a file: they are those of the published
    models unless `num_attention_heads` says them, one number a level. Nor does the prediction type:
    it is `prediction_type`, or what the file marks, or for SD 2 guessed as diffusers does.
    """
    family = _family(stored)
    prefixes = PREFIXES[family]
    texts = {
        name: _text(_below(stored, prefix), prefix, stored, is_xl=family == "sdxl")
        for name, prefix in prefixes.items()
    }
    inputs = _shape(stored, f"{UNET}input_blocks.0.0.weight")[1]
    if prediction_type is None:
        prediction_type = _prediction(family, inputs, stored, numbers)
    is_v = prediction_type == "v_prediction"
    unet = _unet(_below(stored, UNET), family, texts, is_v=is_v)
    if num_attention_heads is not None:
        unet["num_attention_heads"] = tuple(num_attention_heads)
    schedule = scheduler.published_config(family, prediction_type)
    if inputs == 9 and family == "sd1":
        schedule["sampler"] = "ddim"
    if "ztsnr" in stored:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pads = {"text_encoder": "!" if family == "sd2" else END_OF_TEXT, "text_encoder_2": "!"}
    return SingleFile(
        family=family,
        configs={**texts, "unet": diffusers_unet.check_config(unet), "vae": _vae(stored, family)},
        schedule=schedule,
        tokenizers={
            name.replace("text_encoder", "tokenizer"): TokenizerFiles(CLIP_MERGES, pads[name], 77)
            for name in texts
        },
    )


def _family(stored: Mapping[str, StoredTensor]) -> str:
    if not any(name.startswith(UNET) for name in stored):
        raise UnsupportedModel(f"it is no checkpoint of Stable Diffusion but {_what_else(stored)}")
    if any(re.match(r".*(joint|double)_blocks\.0\.", name) for name in stored):
        raise UnsupportedModel("it is another kind of generator (SD 3 or FLUX), which is not built")
    if "edm_mean" in stored:
        raise UnsupportedModel("it is of the EDM kind (Playground 2.5), which is not built")
    if any(name.startswith("conditioner.embedders.0.model.") for name in stored):
        raise UnsupportedModel(
            "it is the refiner of Stable Diffusion XL, which diptych does not run: give the base"
        )
    if (family := family_of(stored)) is None:
        raise UnsupportedModel(
            "it has a UNet but no text encoder that diptych knows: give the full checkpoint"
        )
    if not any(name.startswith(VAES) for name in stored):
        raise UnsupportedModel("it has no autoencoder (VAE): give the full checkpoint")
    return family


def _what_else(names: Mapping[str, StoredTensor]) -> str:
    for pattern, what in _OTHERS:
        if any(re.fullmatch(pattern, name) for name in names):
            return what
    shown = ", ".join(sorted(names)[:3])[:150]
    return f"a file of other tensors ({shown})" if names else "a file without tensors"


def _prediction(
    family: str, inputs: int, stored: Mapping[str, StoredTensor], numbers: Mapping[str, float]
) -> str:
    if "v_pred" in stored:
        return "v_prediction"
    if family != "sd2" or inputs == 9:
        return "epsilon"
    step = numbers.get("global_step")
    if step is None and "global_step" in stored:
        step = read_number(stored["global_step"])
    guess = "epsilon" if step == _SD2_BASE_STEPS else "v_prediction"
    logger.warning(
        "nothing in the file says what its UNet predicts: %s, from global_step %s. "
        "Give prediction_type where pictures are noise.",
        guess,
        step,
    )
    return guess


# --- configs --------------------------------------------------------------------------------------


def _below(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors under a prefix, by the rest of their names."""
    return {
        name[len(prefix) :]: tensor.shape
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }


def _shape(stored: Mapping[str, Any], name: str, axes: int = 0) -> tuple[int, ...]:
    found = stored.get(name)
    shape: tuple[int, ...] = () if found is None else getattr(found, "shape", found)
    if len(shape) < max(axes, 1):
        raise WeightsMismatch(f"{name} is missing or malformed: {FETCH_ANEW}.")
    return shape


def _unet(
    shapes: Mapping[str, tuple[int, ...]],
    family: str,
    texts: Mapping[str, Mapping[str, Any]],
    *,
    is_v: bool,
) -> dict[str, Any]:
    down = _down(shapes)
    widths = tuple(level.width for level in down)
    up = _up_depths(shapes, len(down), down[0].layers + 1)
    if len({level.layers for level in down}) != 1:
        raise UnsupportedModel("its UNet has levels of different lengths, which is not built")
    contexts = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    projections = {len(shape) for name, shape in shapes.items() if name.endswith("proj_in.weight")}
    if len(contexts) != 1 or len(projections) != 1:
        raise UnsupportedModel("its UNet takes no words, or of several widths, which is not built")
    middle = _count(shapes, "middle_block.1.transformer_blocks")
    depths = tuple(level.depth or above or 1 for level, above in zip(down, up, strict=True))
    attention = tuple(level.depth > 0 for level in down)
    above = tuple(depth > 0 for depth in up)
    inputs = _shape(shapes, "input_blocks.0.0.weight", 4)[1]
    if inputs not in (4, 9):
        raise UnsupportedModel(
            f"its UNet takes {inputs} channels; diptych runs those of 4 and 9 (inpainting)"
        )
    return {
        "sample_size": {"sd1": 64, "sd2": 96 if is_v else 64, "sdxl": 128}[family],
        "in_channels": inputs,
        "out_channels": _shape(shapes, "out.2.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": down[0].layers,
        "down_attention": attention,
        "up_attention": None if above == attention else above,
        "mid_attention": middle > 0,
        "transformer_layers_per_block": depths,
        "mid_transformer_layers": None if middle in (0, depths[-1]) else middle,
        "num_attention_heads": tuple(
            _SD1_HEADS if family == "sd1" else max(1, width // _HEAD_SIZE) for width in widths
        ),
        "cross_attention_dim": contexts.pop(),
        "use_linear_projection": projections.pop() == 2,
        # The published file of 768 pixels says so: its scores overflow in half precision.
        "upcast_attention": family == "sd2" and is_v,
        **_extras(shapes, texts),
    }


def _extras(
    shapes: Mapping[str, tuple[int, ...]], texts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "label_emb.0.0.weight" in shapes:
        given = _shape(shapes, "label_emb.0.0.weight", 2)[1]
        pooled = texts.get("text_encoder_2", {}).get("projection_dim") or 0
        found["projection_class_embeddings_input_dim"] = given
        found["addition_time_embed_dim"] = (given - pooled) // 6  # of six numbers about the size
    if "time_embed.cond_proj.weight" in shapes:
        found["time_cond_proj_dim"] = _shape(shapes, "time_embed.cond_proj.weight", 2)[1]
    return found


@dataclass
class _Level:
    width: int
    layers: int = 0
    depth: int = 0


_MOST_BLOCKS = 64  # Stable Diffusion has 12


def _down(shapes: Mapping[str, tuple[int, ...]]) -> list[_Level]:
    levels: list[_Level] = []
    is_new = True
    for number in range(1, 1 + min(len(shapes), _MOST_BLOCKS)):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            is_new = True
            continue
        if f"{block}.0.in_layers.2.weight" not in shapes:
            break
        if is_new:
            levels.append(_Level(_shape(shapes, f"{block}.0.in_layers.2.weight", 4)[0]))
            is_new = False
        levels[-1].layers += 1
        levels[-1].depth = max(levels[-1].depth, _count(shapes, f"{block}.1.transformer_blocks"))
    if not levels:
        raise WeightsMismatch(f"{UNET}input_blocks.1 is missing: {FETCH_ANEW}.")
    return levels


def _up_depths(shapes: Mapping[str, tuple[int, ...]], levels: int, per_level: int) -> list[int]:
    """Return the depth of the transformers on the way up, by level, finest first."""
    blocks = [
        f"output_blocks.{number}.1.transformer_blocks" for number in range(levels * per_level)
    ]
    depths = [_count(shapes, block) for block in blocks]
    return [max(depths[at : at + per_level]) for at in range(0, len(depths), per_level)][::-1]


def _vae(stored: Mapping[str, StoredTensor], family: str) -> dict[str, Any]:
    prefix = next(p for p in VAES if any(name.startswith(p) for name in stored))
    shapes = _below(stored, prefix)
    levels = _count(shapes, "encoder.down")
    widths = [
        _shape(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(levels)
    ]
    return diffusers_vae.check_config(
        {
            "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
            "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
            "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
            "block_out_channels": widths,
            "layers_per_block": _count(shapes, "encoder.down.0.block"),
            "scaling_factor": _SCALING[family],
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "mid_attention": "encoder.mid.attn_1.q.weight" in shapes,
            "force_upcast": family == "sdxl",
        }
    )


def _text(
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    stored: Mapping[str, StoredTensor],
    *,
    is_xl: bool,
) -> dict[str, Any]:
    is_open = prefix.endswith(".model.")
    if not is_open:
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    words = "token_embedding.weight" if is_open else "embeddings.token_embedding.weight"
    places = "positional_embedding" if is_open else "embeddings.position_embedding.weight"
    layers = "transformer.resblocks" if is_open else "encoder.layers"
    wide = "mlp.c_fc.bias" if is_open else "mlp.fc1.bias"
    vocabulary, width = _shape(shapes, words, 2)
    if vocabulary < CLIP_VOCABULARY:
        raise UnsupportedModel(
            f"its text encoder knows {vocabulary} tokens, fewer than CLIP's {CLIP_VOCABULARY}: a "
            "single file carries no tokenizer, so give the diffusers folder"
        )
    has_projection = is_xl and is_open
    unused = None if has_projection else unused_layer(stored, prefix)
    projection = _shape(shapes, "text_projection", 2)[1] if has_projection else None
    return clip_text.check_config(
        {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": _shape(shapes, f"{layers}.0.{wide}")[0],
            "num_hidden_layers": _count(shapes, layers) - (unused is not None),
            "num_attention_heads": max(1, width // _HEAD_SIZE),
            "max_position_embeddings": _shape(shapes, places, 2)[0],
            "hidden_act": "gelu" if is_open else "quick_gelu",
            "projection_dim": projection,
            "output_layer": -2 if is_xl else -1,
            "output_norm": not is_xl,
        }
    )


def _count(shapes: Mapping[str, tuple[int, ...]], path: str) -> int:
    """Count the numbers that follow `path` in the names."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    return len({found[1] for name in shapes if (found := pattern.match(name))})
