"""Speak transformers' VisionEncoderDecoderModel: a ViT or DeiT encoder and a GPT-2 decoder.

The layout on disk is the same from transformers 4 and 5. In memory, transformers 5 calls the
layers of the encoder otherwise, so a raw dump of its state dict does too: `ALIASES`. Our own
captioners with a convolutional stem or the prefix bridge add the last rules, in our own words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from diptych.errors import UnsupportedModel

__all__ = [
    "ALIASES",
    "NAME",
    "RESHAPE",
    "RULES",
    "TELLTALE",
    "TENSORS",
    "TIED",
    "check_config",
    "read_config",
    "write_config",
]

logger = logging.getLogger("diptych")

NAME = "vision-encoder-decoder"
TELLTALE = "encoder.embeddings.cls_token"

_LAYER = "encoder.encoder.layer.{}"
_RAW = "encoder.layers.{}"
ALIASES = (
    (f"{_RAW}.layernorm_before", f"{_LAYER}.layernorm_before"),
    (f"{_RAW}.layernorm_after", f"{_LAYER}.layernorm_after"),
    (f"{_RAW}.attention.q_proj", f"{_LAYER}.attention.attention.query"),
    (f"{_RAW}.attention.k_proj", f"{_LAYER}.attention.attention.key"),
    (f"{_RAW}.attention.v_proj", f"{_LAYER}.attention.attention.value"),
    (f"{_RAW}.attention.o_proj", f"{_LAYER}.attention.output.dense"),
    (f"{_RAW}.mlp.fc1", f"{_LAYER}.intermediate.dense"),
    (f"{_RAW}.mlp.fc2", f"{_LAYER}.output.dense"),
)

_BLOCK = "decoder.transformer.h.{}"
_STAGE = "encoder.embeddings.patch_embeddings.stages.{}"
RULES: tuple[tuple[str, str | None], ...] = (
    (
        "encoder.embeddings.patch_embeddings.projection",
        "encoder.embeddings.patch_embeddings.projection",
    ),
    (f"{_LAYER}.layernorm_before", f"{_LAYER}.layernorm_before"),
    (f"{_LAYER}.attention.attention.query", f"{_LAYER}.attention.query"),
    (f"{_LAYER}.attention.attention.key", f"{_LAYER}.attention.key"),
    (f"{_LAYER}.attention.attention.value", f"{_LAYER}.attention.value"),
    (f"{_LAYER}.attention.output.dense", f"{_LAYER}.attention.output"),
    (f"{_LAYER}.layernorm_after", f"{_LAYER}.layernorm_after"),
    (f"{_LAYER}.intermediate.dense", f"{_LAYER}.mlp.intermediate"),
    (f"{_LAYER}.output.dense", f"{_LAYER}.mlp.output"),
    ("encoder.layernorm", "encoder.layernorm"),
    ("enc_to_dec_proj", "bridge.enc_to_dec_proj"),
    ("decoder.transformer.wte", "decoder.wte"),
    ("decoder.transformer.wpe", "decoder.wpe"),
    (f"{_BLOCK}.ln_1", "decoder.h.{}.ln_1"),
    (f"{_BLOCK}.attn.c_attn", "decoder.h.{}.attn.c_attn"),
    (f"{_BLOCK}.attn.c_proj", "decoder.h.{}.attn.c_proj"),
    (f"{_BLOCK}.ln_cross_attn", "decoder.h.{}.ln_cross_attn"),
    (f"{_BLOCK}.crossattention.q_attn", "decoder.h.{}.crossattention.q_attn"),
    (f"{_BLOCK}.crossattention.c_attn", "decoder.h.{}.crossattention.c_attn"),
    (f"{_BLOCK}.crossattention.c_proj", "decoder.h.{}.crossattention.c_proj"),
    (f"{_BLOCK}.ln_2", "decoder.h.{}.ln_2"),
    (f"{_BLOCK}.mlp.c_fc", "decoder.h.{}.mlp.c_fc"),
    (f"{_BLOCK}.mlp.c_proj", "decoder.h.{}.mlp.c_proj"),
    ("decoder.transformer.ln_f", "decoder.ln_f"),
    ("decoder.lm_head", "decoder.lm_head"),
    ("encoder.pooler.dense", None),
    # Ours.
    (f"{_STAGE}.{{}}", f"{_STAGE}.{{}}"),
    (f"{_STAGE}.conv_1.{{}}", f"{_STAGE}.conv_1.{{}}"),
    (f"{_STAGE}.conv_2.{{}}", f"{_STAGE}.conv_2.{{}}"),
    ("bridge.projection", "bridge.projection"),
    ("bridge.layer_norm", "bridge.layer_norm"),
)
TENSORS: tuple[tuple[str, str | None], ...] = (
    ("encoder.embeddings.cls_token", "encoder.embeddings.cls_token"),
    ("encoder.embeddings.distillation_token", "encoder.embeddings.distillation_token"),
    ("encoder.embeddings.position_embeddings", "encoder.embeddings.position_embeddings"),
    # Left over from pretraining, and from when causal masks were saved.
    ("encoder.embeddings.mask_token", None),
    (f"{_BLOCK}.attn.bias", None),
    (f"{_BLOCK}.attn.masked_bias", None),
    (f"{_BLOCK}.crossattention.bias", None),
    (f"{_BLOCK}.crossattention.masked_bias", None),
)

# GPT-2 keeps its matrices (in, out), the square ones too.
RESHAPE: Mapping[str, Literal["transpose"]] = {
    f"{_BLOCK}.{path}.weight": "transpose"
    for path in (
        "attn.c_attn",
        "attn.c_proj",
        "crossattention.q_attn",
        "crossattention.c_attn",
        "crossattention.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    )
}

# Names in the file: the first may repeat the second, or either be left out.
TIED = ("decoder.lm_head.weight", "decoder.transformer.wte.weight")

# --- configuration --------------------------------------------------------------------------------


class _Field(NamedTuple):
    """Bound a config value. The bounds are far beyond any captioner, and near enough to build."""

    kind: type
    default: Any
    low: float = 0
    high: float = 0
    foreign: tuple[str, ...] = ()  # what config.json calls it, where not the same


# The words of `tanh` and `erf` GELU and the rest: those of `models.layers.ACTIVATIONS`.
ACTIVATIONS = frozenset(
    {"gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish"}
)

ENCODER = {
    "image_size": _Field(int, 224, 1, 4096),
    "patch_size": _Field(int, 16, 1, 4096),
    "num_channels": _Field(int, 3, 1, 16),
    "hidden_size": _Field(int, 768, 1, 16384),
    "num_hidden_layers": _Field(int, 12, 1, 256),
    "num_attention_heads": _Field(int, 12, 1, 1024),
    "intermediate_size": _Field(int, 3072, 1, 131072),
    "hidden_act": _Field(str, "gelu"),
    "layer_norm_eps": _Field(float, 1e-12, 0, 1),
    "qkv_bias": _Field(bool, True),
    "distillation_token": _Field(bool, False),
    "stem_channels": _Field(list, []),
    "stem_blocks": _Field(int, 1, 0, 64),
    "dropout": _Field(float, 0.0, 0, 0.99, ("hidden_dropout_prob",)),
}
DECODER = {
    "vocab_size": _Field(int, 50257, 1, 4_000_000),
    "max_position_embeddings": _Field(int, 1024, 1, 1_000_000, ("n_positions", "n_ctx")),
    "hidden_size": _Field(int, 768, 1, 16384, ("n_embd",)),
    "num_hidden_layers": _Field(int, 12, 1, 256, ("n_layer",)),
    "num_attention_heads": _Field(int, 12, 1, 1024, ("n_head",)),
    "intermediate_size": _Field(int, None, 1, 131072, ("n_inner",)),  # None: 4 times hidden_size
    "hidden_act": _Field(str, "gelu_new", foreign=("activation_function",)),
    "layer_norm_eps": _Field(float, 1e-5, 0, 1, ("layer_norm_epsilon",)),
    "add_cross_attention": _Field(bool, True),
    "tie_word_embeddings": _Field(bool, True),
    "scale_attn_weights": _Field(bool, True),
    "scale_attn_by_inverse_layer_idx": _Field(bool, False),
    "dropout": _Field(float, 0.1, 0, 0.99, ("resid_pdrop",)),
}
_BRIDGES = ("cross-attention", "prefix")
_ENCODERS = ("vit", "deit")


def read_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `config.json` into `{"encoder": …, "decoder": …, "bridge": …}`, in our words.

    Raises `UnsupportedModel` for another kind of model, and for values that build none.
    """
    _check_kind(document)
    encoder, decoder = dict(document["encoder"]), dict(document["decoder"])
    bridge = document.get("bridge", "cross-attention")
    for side in ("image_size", "patch_size"):
        encoder[side] = _square(side, encoder.get(side))
    encoder["distillation_token"] = encoder["model_type"] == "deit"
    config = {
        "encoder": _translate("encoder", ENCODER, encoder),
        "decoder": _translate("decoder", DECODER, decoder),
        "bridge": bridge,
    }
    if config["decoder"]["intermediate_size"] is None:
        width = config["decoder"]["hidden_size"]
        config["decoder"]["intermediate_size"] = 4 * width if type(width) is int else width
    # A decoder inside this kind of model always looks at the picture, whatever its own entry says.
    config["decoder"]["add_cross_attention"] = bridge == "cross-attention"
    checked = check_config(config)
    _check_foreign(encoder, decoder, checked)
    return checked


def write_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate our words into a `config.json` that transformers reads too."""
    config = check_config(config)
    encoder, decoder = dict(config["encoder"]), dict(config["decoder"])
    document: dict[str, Any] = {
        "architectures": ["VisionEncoderDecoderModel"],
        "model_type": NAME,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,  # the encoder has no words; the decoder has its own entry
        "encoder": {
            "model_type": "deit" if encoder.pop("distillation_token") else "vit",
            "attention_probs_dropout_prob": 0.0,
        },
        "decoder": {
            "model_type": "gpt2",
            "is_decoder": True,
            "embd_pdrop": decoder["dropout"],
            "attn_pdrop": decoder["dropout"],
            # Ours say 50256 by default, which a smaller vocabulary does not have.
            "bos_token_id": None,
            "eos_token_id": None,
        },
    }
    if not encoder["stem_channels"]:
        del encoder["stem_channels"], encoder["stem_blocks"]
    if config["bridge"] != "cross-attention":
        document["bridge"] = config["bridge"]
    for part, fields, values in (("encoder", ENCODER, encoder), ("decoder", DECODER, decoder)):
        for name, value in values.items():
            document[part][(*fields[name].foreign, name)[0]] = value
    return document


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in our words, every field there and in bounds, else `UnsupportedModel`."""
    if not isinstance(config.get("encoder"), dict) or not isinstance(config.get("decoder"), dict):
        raise UnsupportedModel("the config does not describe an encoder and a decoder")
    if config.get("bridge") not in _BRIDGES:
        raise UnsupportedModel(
            f"bridge is {str(config.get('bridge'))[:40]!r}: diptych knows {', '.join(_BRIDGES)}"
        )
    encoder = _checked("encoder", ENCODER, config["encoder"])
    decoder = _checked("decoder", DECODER, config["decoder"])
    for part, values in (("encoder", encoder), ("decoder", decoder)):
        width, heads = values["hidden_size"], values["num_attention_heads"]
        if width % heads:
            raise UnsupportedModel(
                f"{part}: hidden_size {width} does not divide by num_attention_heads {heads}"
            )
    image, patch, stem = encoder["image_size"], encoder["patch_size"], encoder["stem_channels"]
    if image % patch:
        raise UnsupportedModel(f"encoder: image_size {image} does not divide by patch_size {patch}")
    if stem and patch != 2 ** len(stem):
        raise UnsupportedModel(
            f"encoder: a stem of {len(stem)} stages stands for patch_size {2 ** len(stem)}, "
            f"not {patch}"
        )
    if decoder["add_cross_attention"] != (config["bridge"] == "cross-attention"):
        raise UnsupportedModel(
            f"decoder: add_cross_attention is {decoder['add_cross_attention']}, "
            f"which the bridge {config['bridge']} contradicts"
        )
    return {"encoder": encoder, "decoder": decoder, "bridge": config["bridge"]}


def _check_kind(document: Mapping[str, Any]) -> None:
    kind = document.get("model_type")
    wanted = f"diptych runs {NAME} captioners: ViT or DeiT with GPT-2"
    if kind != NAME:
        what = f"is a {str(kind)[:60]!r} model" if kind is not None else "names no model_type"
        raise UnsupportedModel(f"config.json {what}; {wanted}")
    if document.get("quantization_config"):
        raise UnsupportedModel("config.json is of a quantized checkpoint; fetch the full one")
    for part, known in (("encoder", _ENCODERS), ("decoder", ("gpt2",))):
        entry = document.get(part)
        if not isinstance(entry, dict):
            raise UnsupportedModel(f"config.json does not describe its {part}; {wanted}")
        if entry.get("model_type") not in known:
            raise UnsupportedModel(f"its {part} is {str(entry.get('model_type'))[:60]!r}; {wanted}")


def _square(name: str, value: Any) -> Any:
    """Return one side for a size that is written as two."""
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise UnsupportedModel(f"encoder: {name} is {str(value)[:40]}; diptych runs squares")
    return value[0]


def _translate(part: str, fields: Mapping[str, _Field], entry: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in fields.items():
        words = [word for word in (*field.foreign, name) if entry.get(word) is not None]
        found[name] = entry[words[0]] if words else field.default
        for word in words[1:]:
            # n_ctx went along with n_positions for years, and means nothing beside it.
            if word != "n_ctx" and entry[word] != found[name]:
                raise UnsupportedModel(f"{part}: {words[0]} and {word} contradict each other")
    known = {word for name, field in fields.items() for word in (*field.foreign, name)}
    if unread := sorted(word for word in entry if word not in known):
        logger.debug("config.json: %s: not read: %s", part, ", ".join(unread)[:400])
    return found


def _checked(part: str, fields: Mapping[str, _Field], values: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(values) - set(fields)):
        raise UnsupportedModel(f"{part}: diptych knows no {unknown[0][:60]}")
    found = {}
    for name, field in fields.items():
        value = values.get(name, field.default)
        if name == "stem_channels":
            value = _channels(value)
        elif name == "hidden_act":
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise UnsupportedModel(
                    f"{part}: hidden_act is {str(value)[:40]!r}; "
                    f"diptych knows {', '.join(sorted(ACTIVATIONS))}"
                )
        elif field.kind is bool:
            if not isinstance(value, bool):
                raise UnsupportedModel(f"{part}: {name} is {str(value)[:40]!r}, not true or false")
        else:
            value = _number(f"{part}: {name}", value, field)
        found[name] = value
    return found


def _number(name: str, value: Any, field: _Field) -> float:
    kinds = (int,) if field.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        noun = "a whole number" if field.kind is int else "a number"
        raise UnsupportedModel(f"{name} is {str(value)[:40]!r}, not {noun}")
    if not field.low <= value <= field.high:
        raise UnsupportedModel(f"{name} is {value}; diptych takes {field.low:g} to {field.high:g}")
    return field.kind(value)  # type: ignore[no-any-return]


def _channels(value: Any) -> list[int]:
    if not isinstance(value, list | tuple) or len(value) > 8:
        raise UnsupportedModel("encoder: stem_channels is not a list of at most 8 numbers")
    field = _Field(int, None, 1, 4096)
    return [int(_number("encoder: stem_channels", item, field)) for item in value]


def _check_foreign(
    encoder: Mapping[str, Any], decoder: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Refuse what changes the numbers and has no place in our networks."""
    width = config["encoder"]["hidden_size"]
    if decoder.get("cross_attention_hidden_size") is not None:
        # transformers then builds no enc_to_dec_proj, and GPT-2 takes its own width only.
        if decoder["cross_attention_hidden_size"] != width:
            raise UnsupportedModel(
                f"decoder: cross_attention_hidden_size is not the encoder's hidden_size, {width}"
            )
        if config["decoder"]["hidden_size"] != width:
            raise UnsupportedModel(
                "decoder: cross_attention_hidden_size is set, so nothing joins the encoder's width "
                f"{width} to the decoder's {config['decoder']['hidden_size']}"
            )
    head_size = width // config["encoder"]["num_attention_heads"]
    if encoder.get("head_dim") not in (None, head_size):
        raise UnsupportedModel(f"encoder: head_dim is not hidden_size / heads, {head_size}")
