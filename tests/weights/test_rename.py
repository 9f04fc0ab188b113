"""The laws of a dialect's table, and what it reads from a config."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from diptych.errors import UnsupportedModel
from diptych.models.gpt2 import Gpt2Config
from diptych.models.layers import ACTIVATIONS
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.models.vit import ViTConfig
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.rename import LEAVES, backwards, forwards, reshape

CONFIGS = [
    VisionEncoderDecoderConfig(
        replace(ViTConfig.tiny(), **encoder),
        replace(
            Gpt2Config.tiny(),
            add_cross_attention=bridge == "cross-attention",
            tie_word_embeddings=tied,
            num_hidden_layers=12,
            hidden_size=width,
        ),
        bridge,
    )
    for bridge in ("cross-attention", "prefix")
    for tied in (True, False)
    for width in (24, 32)
    for encoder in (
        {"distillation_token": True, "num_hidden_layers": 11},
        {"stem_channels": (4, 6, 8), "stem_blocks": 2, "qkv_bias": False},
    )
]


def names_of(config: VisionEncoderDecoderConfig) -> list[str]:
    with torch.device("cpu"):
        return list(VisionEncoderDecoder(config).state_dict())


EVERY = (*dialect.RULES, *dialect.TENSORS)
FILES = [file for file, _ in EVERY]


def test_every_pattern_stands_once() -> None:
    kept = [module for _, module in EVERY if module is not None]
    assert len(set(FILES)) == len(FILES)
    assert len(set(kept)) == len(kept)
    others = [other for other, _ in dialect.ALIASES]
    assert len(set(others)) == len(others)
    assert not set(others) & set(FILES)


@pytest.mark.parametrize("side", [0, 1], ids=["file", "module"])
def test_no_name_can_match_two_rules(side: int) -> None:
    paths = {rule[side] for rule in dialect.RULES}
    for rule in dialect.TENSORS:
        path, _, leaf = (rule[side] or "").rpartition(".")
        assert not (leaf in LEAVES and path in paths), rule


def test_every_kept_rule_is_invertible() -> None:
    for rules, leaf in ((dialect.RULES, ".weight"), (dialect.TENSORS, "")):
        for file, module in rules:
            if module is None:
                continue
            assert file.count("{}") == module.count("{}")
            numbers = [str(7 + place) for place in range(file.count("{}"))]
            there, here = file.format(*numbers) + leaf, module.format(*numbers) + leaf
            assert forwards(dialect, [there]).names == {here: there}
            assert backwards(dialect, [here]) == {here: there}


def test_aliases_lead_to_rules() -> None:
    paths = dict(dialect.RULES)
    for other, file in dialect.ALIASES:
        assert paths[file] is not None
        assert other.count("{}") == file.count("{}")


def test_patterns_hold_no_numbers() -> None:
    for file, module in EVERY:
        for pattern in (file, module or ""):
            assert not any(part.isdigit() for part in pattern.split("."))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_is_filled_exactly_once(config: VisionEncoderDecoderConfig) -> None:
    names = names_of(config)
    files = backwards(dialect, names)
    assert len(set(files.values())) == len(names)
    renamed = forwards(dialect, files.values())
    assert renamed.names == {name: files[name] for name in names}
    assert renamed.unknown == renamed.dropped == ()
    assert renamed.twice == {}


def test_transposed_are_all_matrices_of_gpt2_and_no_other() -> None:
    module = VisionEncoderDecoder(CONFIGS[0])
    files = backwards(dialect, module.state_dict())
    found = {name for name, file in files.items() if reshape(dialect, file) == "transpose"}
    wanted = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if name.startswith("decoder.h.") and isinstance(part, torch.nn.Linear)
    }
    assert found == wanted
    assert {pattern for pattern in dialect.RESHAPE if pattern.count("{}") != 1} == set()


@pytest.mark.parametrize(
    "name",
    [
        "decoder.transformer.h.0.attn.bias",
        "decoder.transformer.h.10.attn.masked_bias",
        "decoder.transformer.h.0.crossattention.bias",
        "decoder.transformer.h.0.crossattention.masked_bias",
        "encoder.pooler.dense.weight",
        "encoder.pooler.dense.bias",
        "encoder.embeddings.mask_token",
    ],
)
def test_known_leftovers_are_dropped(name: str) -> None:
    assert forwards(dialect, [name, dialect.TELLTALE]).dropped == (name,)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.transformer.h.0.attn.c_attn.bias",
        "decoder.transformer.h.0.attn.c_proj.bias",
        "decoder.transformer.h.0.crossattention.c_proj.bias",
    ],
)
def test_weights_that_end_like_leftovers_are_kept(name: str) -> None:
    assert list(forwards(dialect, [name]).names.values()) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "decoder.transformer.h.00.ln_1.weight",
        "decoder.transformer.h.x.ln_1.weight",
        "decoder.transformer.h..ln_1.weight",
        "decoder.transformer.h.{}.ln_1.weight",
        "decoder.transformer.h.٣.ln_1.weight",
        "decoder.transformer.h.0.ln_1.weights",
        "decoder.transformer.h.0.ln_1",
        "decoder.transformer.h.0.attn.masked_bias.bias",
        "decoder.h.0.ln_1.weight",
        "encoder.embeddings.cls_token.weight.weight",
        "transformer.wte.weight",
        "",
        ".",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    # Beside a good one, because a prefix that all names share is taken for a wrapper's.
    assert forwards(dialect, [name, dialect.TELLTALE]).unknown == (name,)


def test_name_that_no_rule_gives() -> None:
    with pytest.raises(KeyError, match="no rule of vision-encoder-decoder leads to decoder"):
        backwards(dialect, ["decoder.h.0.attn.c_bttn.weight"])


def test_two_names_for_one_place_are_both_told() -> None:
    names = ["encoder.layers.3.mlp.fc1.bias", "encoder.encoder.layer.3.intermediate.dense.bias"]
    assert forwards(dialect, names).twice == {
        "encoder.encoder.layer.3.mlp.intermediate.bias": tuple(names)
    }


# Configs.


def document() -> dict[str, Any]:
    return {
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2"},
    }


def test_defaults_are_those_of_the_published_parts() -> None:
    config = dialect.read_config(document())
    encoder = {**config["encoder"], "stem_channels": tuple(config["encoder"]["stem_channels"])}
    assert ViTConfig(**encoder) == ViTConfig()
    assert replace(Gpt2Config(**config["decoder"]), dropout=0.0) == Gpt2Config()


@pytest.mark.parametrize(("table", "config"), [("ENCODER", ViTConfig), ("DECODER", Gpt2Config)])
def test_the_table_has_the_fields_of_the_network(table: str, config: type) -> None:
    assert list(getattr(dialect, table)) == [field.name for field in fields(config)]


def test_activations_are_those_of_the_networks() -> None:
    assert set(ACTIVATIONS) == dialect.ACTIVATIONS


@pytest.mark.parametrize("config", CONFIGS)
def test_config_comes_back(config: VisionEncoderDecoderConfig) -> None:
    config = replace(config, encoder=replace(config.encoder, dropout=0.25, layer_norm_eps=1e-7))
    ours = asdict(config)
    ours["encoder"]["stem_channels"] = list(ours["encoder"]["stem_channels"])
    written = json.loads(json.dumps(dialect.write_config(ours)))
    assert dialect.read_config(written) == ours


def test_what_transformers_writes_is_read(transformers: Any) -> None:
    theirs = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.DeiTConfig(image_size=[64, 64], patch_size=[8, 8], hidden_dropout_prob=0.25),
        transformers.GPT2Config(n_inner=77, n_layer=6, resid_pdrop=0.5, n_positions=99),
    )
    config = dialect.read_config(json.loads(theirs.to_json_string(use_diff=False)))
    assert config["encoder"]["image_size"] == 64
    assert config["encoder"]["distillation_token"] is True
    assert config["encoder"]["dropout"] == 0.25
    decoder = config["decoder"]
    found = [decoder[w] for w in ("intermediate_size", "num_hidden_layers", "dropout")]
    assert found == [77, 6, 0.5]
    assert decoder["max_position_embeddings"] == 99


REFUSED = {
    "is a 'blip' model": {"model_type": "blip"},
    "names no model_type": {"model_type": None},
    "its encoder is 'swin'; diptych runs": {"encoder.model_type": "swin"},
    "its encoder is 'beit'": {"encoder.model_type": "beit"},
    "its decoder is 'bert'": {"decoder.model_type": "bert"},
    "does not describe its encoder": {"encoder": None},
    "does not describe its decoder": {"decoder": "gpt2"},
    "quantized checkpoint": {"quantization_config": {"load_in_8bit": True}},
    "bridge is 'suspension'": {"bridge": "suspension"},
    "hidden_size 768 does not divide by num_attention_heads 7": {"encoder.num_attention_heads": 7},
    "decoder: hidden_size 700 does not divide": {"decoder.n_embd": 700},
    "image_size 225 does not divide by patch_size 16": {"encoder.image_size": 225},
    "image_size is [224, 112]; diptych runs squares": {"encoder.image_size": [224, 112]},
    "encoder: hidden_act is 'tanh'; diptych knows gelu, gelu_new": {"encoder.hidden_act": "tanh"},
    "decoder: hidden_act is \"['gelu']\"": {"decoder.activation_function": ["gelu"]},
    "num_hidden_layers is 1000000; diptych takes 1 to 256": {"decoder.n_layer": 1_000_000},
    "hidden_size is -768": {"encoder.hidden_size": -768},
    "hidden_size is '768.0', not a whole number": {"encoder.hidden_size": 768.0},
    "hidden_size is 'True', not a whole number": {"encoder.hidden_size": True},
    "vocab_size is 'many'": {"decoder.vocab_size": "many"},
    "layer_norm_eps is 'small', not a number": {"decoder.layer_norm_epsilon": "small"},
    "qkv_bias is '1', not true or false": {"encoder.qkv_bias": 1},
    "n_embd and hidden_size contradict": {"decoder.n_embd": 768, "decoder.hidden_size": 769},
    "stem_channels is not a list": {"encoder.stem_channels": 3},
    "a stem of 3 stages stands for patch_size 8, not 16": {"encoder.stem_channels": [1, 2, 3]},
    "cross_attention_hidden_size is not the encoder's": {"decoder.cross_attention_hidden_size": 9},
    "so nothing joins the encoder's width 384 to the decoder's 768": {
        "encoder.hidden_size": 384,
        "decoder.cross_attention_hidden_size": 384,
    },
    "head_dim is not hidden_size / heads, 64": {"encoder.head_dim": 32},
}


@pytest.mark.parametrize(("text", "changes"), REFUSED.items(), ids=REFUSED)
def test_other_configs_are_refused_with_a_reason(text: str, changes: dict[str, Any]) -> None:
    config = document()
    for word, value in changes.items():
        *parents, last = word.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    with pytest.raises(UnsupportedModel) as caught:
        dialect.read_config(config)
    assert text in str(caught.value)


ODD = [None, True, 0, -1, 2**53, 1e308, "x" * 5000, "", [], {}, [[]], {"a": 1}, [1, 2, 3]]


def test_no_value_brings_another_error() -> None:
    full = json.loads(json.dumps(dialect.write_config(dialect.read_config(document()))))
    full["bridge"] = "cross-attention"
    full["encoder"].update(stem_channels=[], stem_blocks=1, head_dim=64)
    full["decoder"].update(cross_attention_hidden_size=768)
    places = [(None, word) for word in full]
    places += [(part, word) for part in ("encoder", "decoder") for word in full[part]]
    for part, word in places:
        for value in ODD:
            config = copy.deepcopy(full)
            (config if part is None else config[part])[word] = value
            try:
                found = dialect.read_config(config)
            except UnsupportedModel:
                continue
            dialect.write_config(found)
            assert found == dialect.check_config(found)


def test_our_words_are_closed() -> None:
    config = dialect.read_config(document())
    config["decoder"]["auto_map"] = "evil.py"
    with pytest.raises(UnsupportedModel, match="decoder: diptych knows no auto_map"):
        dialect.check_config(config)
    with pytest.raises(UnsupportedModel, match="bridge prefix contradicts"):
        dialect.check_config({**dialect.read_config(document()), "bridge": "prefix"})
