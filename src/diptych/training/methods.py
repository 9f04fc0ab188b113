"""Choose what of a generator learns: a method is nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diptych.models.lora import LowRank
from diptych.text import ClipTokenizer
from diptych.training.learned_words import LearnedWords, learn_word
from diptych.training.lora import DEFAULT_RANK, add_updates, choose_layers, matrices
from diptych.training.memory import HALVES
from diptych.training.optimizers import Group
from diptych.training.options import GeneratorTrainOptions
from diptych.weights.generator_files import GeneratorFolder

__all__ = ["Learning", "choose_learning", "generator_defaults"]

_RATES = {"full": 1e-5, "lora": 1e-4, "dreambooth": 5e-6, "textual-inversion": 5e-4}


def generator_defaults(options: GeneratorTrainOptions, model: GeneratorFolder) -> dict[str, Any]:
    """Return what holds for this method and model where the user says nothing."""
    method = "lora" if options.is_lora else options.method
    is_small = model.family == "diptych"
    shows_one_thing = options.method in ("dreambooth", "textual-inversion")
    return {
        # The default generator is a hundred times smaller than what these rates were found on.
        "learning_rate": _RATES[method] * (5 if is_small else 1),
        "resolution": int(model.defaults.get("width", 512)),
        "caption_dropout": 0.0 if shows_one_thing else 0.1,
        "validation_fraction": 0.0 if shows_one_thing else None,
    }


@dataclass(frozen=True, slots=True)
class Learning:
    """Hold what learns: as groups for the optimizer, and as what is written in the end.

    `tokenizers` are those of the generator, with the word that is learned.
    """

    groups: Sequence[Group]
    tokenizers: Mapping[str, ClipTokenizer]
    updates: Mapping[tuple[str, str], LowRank] = field(default_factory=dict)
    words: Mapping[str, LearnedWords] = field(default_factory=dict)


def choose_learning(
    modules: Mapping[str, nn.Module],
    tokenizers: Mapping[str, ClipTokenizer],
    options: GeneratorTrainOptions,
) -> Learning:
    """Make parameters learn, in float32, and leave all others as they are.

    With half precision and a LoRA or a word, weights that do not learn are kept in half the room,
    all but those of the autoencoder, which may overflow; a whole model is written as it was. Raises
    `BadInput` for layers or words that cannot be.
    """
    texts = {name: each for name, each in modules.items() if name.startswith("text_encoder")}
    learning = ["unet", *(texts if options.train_text_encoder else ())]
    keeps_weights = options.is_lora or options.method == "textual-inversion"
    for module in modules.values():
        module.requires_grad_(False).eval()
    if keeps_weights and (half := HALVES.get(options.mixed_precision)) is not None:
        for name, module in modules.items():
            if name != "vae":
                module.to(half)
    if options.method == "textual-inversion":
        return _learned_word(texts, tokenizers, options)
    updates: dict[tuple[str, str], LowRank] = {}
    if options.is_lora:
        chosen = choose_layers({name: modules[name] for name in learning}, options.lora_layers)
        updates = add_updates(chosen, options.rank or DEFAULT_RANK, options.alpha, options.seed)
        parameters = matrices(updates)
    else:
        parameters = {
            f"{network}.{name}": each
            for network in learning
            for name, each in modules[network].named_parameters()
        }
    for each in parameters.values():
        each.requires_grad_(True)
    return Learning(_groups(parameters, options), tokenizers, updates)


def _learned_word(
    texts: Mapping[str, nn.Module],
    tokenizers: Mapping[str, ClipTokenizer],
    options: GeneratorTrainOptions,
) -> Learning:
    assert options.placeholder_token is not None and options.learning_rate is not None
    words, knowing = learn_word(
        texts,
        tokenizers,
        options.placeholder_token,
        initializer=options.initializer_token,
        num_vectors=options.num_vectors,
        seed=options.seed,
    )
    named = {f"{name}.vectors": each.vectors for name, each in words.items()}
    return Learning([Group(named, options.learning_rate)], knowing, words=words)


def _groups(parameters: Mapping[str, nn.Parameter], options: GeneratorTrainOptions) -> list[Group]:
    """Return the UNet's and the text encoders' parameters, each with their rate."""
    assert options.learning_rate is not None
    rates = {
        True: options.learning_rate,
        False: options.text_encoder_learning_rate or options.learning_rate,
    }
    groups = [
        Group({n: p for n, p in parameters.items() if n.startswith("unet.") is of_unet}, rate)
        for of_unet, rate in rates.items()
    ]
    return [group for group in groups if group.parameters]
