"""Settings of a training run: what both panels share, then what each adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from diptych.errors import BadInput
from diptych.option_fields import check_values, option, plain, replace, setting, values

__all__ = [
    "BRIDGES",
    "CAPTIONER_METHODS",
    "FREEZE",
    "GENERATOR_METHODS",
    "CaptionerTrainOptions",
    "GeneratorTrainOptions",
    "TrainOptions",
]

GENERATOR_METHODS = ("full", "lora", "dreambooth", "textual-inversion")
CAPTIONER_METHODS = ("full", "lora")
FREEZE = ("none", "encoder", "decoder")
BRIDGES = ("cross-attention", "prefix")
OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
PRECISIONS = ("no", "bf16", "fp16")

# Words of other programs, each with ours.
_FOREIGN = {
    "adam_weight_decay": "weight_decay",
    "batch_size": "train_batch_size",
    "clip_grad_norm": "max_grad_norm",
    "lora_alpha": "alpha",
    "lora_rank": "rank",
    "lr": "learning_rate",
    "max_steps": "max_train_steps",
    "min_snr_gamma": "snr_gamma",
    "network_alpha": "alpha",
    "network_dim": "rank",
    "save_steps": "checkpointing_steps",
    "steps": "max_train_steps",
    "use_8bit_adam": "optimizer",
    "use_ema": "ema_decay",
    "warmup_steps": "lr_warmup_steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Say how to train; None leaves the choice to the method.

    Words are those of diffusers' training scripts. Every field's metadata holds `kind`, `help`,
    `default`, `low`, `high`, `choices`; doors build their flags from it. Raises BadInput when a
    value cannot be used.
    """

    max_train_steps: int = setting(
        int, "Optimizer steps of the whole run.", default=1000, low=1, high=100_000_000
    )
    learning_rate: float | None = option(
        float, "Of the optimizer, at its peak.", low=1e-12, high=100.0
    )
    train_batch_size: int = setting(
        int, "Pictures of a step, over all processes.", default=4, low=1, high=65_536
    )
    gradient_accumulation_steps: int = setting(
        int, "Batches whose gradients are added up to one step.", default=1, low=1, high=65_536
    )
    lr_scheduler: str = setting(
        str, "How the learning rate goes on after the warm-up.", default="constant",
        choices=SCHEDULERS,
    )  # fmt: skip
    lr_warmup_steps: int = setting(
        int, "Steps over which the learning rate rises.", default=0, low=0, high=100_000_000
    )
    optimizer: str = setting(
        str, "adamw_8bit wants the package bitsandbytes.", default="adamw", choices=OPTIMIZERS
    )
    weight_decay: float = setting(
        float, "Pull of the optimizer towards zero.", default=1e-2, low=0.0, high=10.0
    )
    max_grad_norm: float = setting(
        float, "Longest gradient; longer ones are shortened to it.", default=1.0, low=1e-6, high=1e9
    )
    mixed_precision: str = setting(
        str, "Type that products are computed in.", default="no", choices=PRECISIONS
    )
    gradient_checkpointing: bool = setting(
        bool, "Compute activations twice to keep fewer.", default=False
    )
    ema_decay: float = setting(
        float, "Of the averaged weights, which are those kept; 0 is none.",
        default=0.0, low=0.0, high=0.999999,
    )  # fmt: skip
    validation_fraction: float | None = option(
        float, "Share of the pictures that is held out, chosen by content.",
        low=0.0, high=0.9,
    )  # fmt: skip
    validation_steps: int | None = option(
        int, "Steps from one validation to the next; none is 10 in all.", low=1, high=100_000_000
    )
    num_validation_images: int = setting(
        int, "Most held-out pictures that are looked at.", default=64, low=1, high=100_000
    )
    keep_best: bool = setting(
        bool,
        "Keep the weights that did best in validation (a generator's lowest loss, a captioner's "
        "highest CIDEr-D), not the last.",
        default=False,
    )
    checkpointing_steps: int = setting(
        int, "Steps from one checkpoint to the next.", default=500, low=1, high=100_000_000
    )
    checkpoints_total_limit: int = setting(
        int, "Checkpoints that are kept, the newest.", default=2, low=1, high=10_000
    )
    logging_steps: int = setting(
        int, "Steps from one line of metrics to the next.", default=10, low=1, high=1_000_000
    )
    report_to: str = setting(
        str, "Further places for metrics.", default="none", choices=("none", "tensorboard")
    )
    random_flip: bool = setting(bool, "Mirror every second picture.", default=False)
    image_column: str | None = setting(
        str, "Column or field with the picture's file.", default=None
    )
    caption_column: str | None = setting(str, "Column or field with its caption.", default=None)
    seed: int = setting(
        int, "Decides all chance; the same seed gives the same weights on a CPU.",
        default=0, low=0, high=2**63 - 1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise BadInput for a value out of range, or for two that exclude each other."""
        check_values(self)
        if self.lr_warmup_steps >= self.max_train_steps:
            raise BadInput(
                f"lr_warmup_steps is {self.lr_warmup_steps}, and the run has "
                f"{self.max_train_steps} steps: give fewer"
            )

    def replace(self, **overrides: object) -> Self:
        """Return a copy with these options changed; BadInput for a word that is no option."""
        return replace(self, overrides, "a training option", _FOREIGN)

    def resolve(self, defaults: Mapping[str, object] | None = None) -> Self:
        """Fill what is still open from `defaults`, then from the library."""
        chosen = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.metadata["from_model"]:
                value = (defaults or {}).get(field.name, field.metadata["default"])
            chosen[field.name] = plain(value)
        return type(self)(**chosen)

    def as_dict(self) -> dict[str, Any]:
        """Return every option as JSON can hold it."""
        return {
            name: list(value) if isinstance(value, tuple) else plain(value)
            for name, value in values(self).items()
        }


# A word of one method, given with another, is one that was forgotten.
_OF_ONE_METHOD = {
    "placeholder_token": "textual-inversion",
    "initializer_token": "textual-inversion",
    "instance_prompt": "dreambooth",
    "class_prompt": "dreambooth",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorTrainOptions(TrainOptions):
    """Say how to train a generator of pictures."""

    method: str = setting(
        str, "What learns: all weights, a LoRA beside them, one subject, or one word.",
        default="lora", choices=GENERATOR_METHODS,
    )  # fmt: skip
    resolution: int | None = option(
        int, "Side of a square of as many pixels as a picture has; none is the model's.",
        low=16, high=4096,
    )  # fmt: skip
    buckets: bool = setting(
        bool, "Keep proportions, in sizes of about as many pixels each.", default=True
    )
    center_crop: bool = setting(
        bool, "Cut pictures out of the middle, not at random; cached so.", default=True
    )
    cache_latents: bool = setting(
        bool, "Encode each picture once and keep the result on the disk.", default=True
    )
    train_text_encoder: bool = setting(bool, "Let the text encoder learn too.", default=False)
    text_encoder_learning_rate: float | None = setting(
        float, "Of the text encoder; none is learning_rate.", default=None, low=1e-12, high=100.0
    )
    # LoRA
    rank: int | None = setting(
        int, "Of the LoRA; given with dreambooth, a LoRA learns the subject.",
        default=None, low=1, high=4096,
    )  # fmt: skip
    alpha: float | None = setting(
        float, "The LoRA counts alpha / rank times; none is rank.", default=None, low=1e-6, high=1e6
    )
    lora_layers: str = setting(
        str, "Layers with a LoRA: attention, feed-forward, conv, all, or parts of their paths, "
        "with commas between.", default="attention",
    )  # fmt: skip
    save_kohya: bool = setting(bool, "Write the LoRA in kohya's layout as well.", default=False)
    # Loss
    snr_gamma: float | None = setting(
        float, "Weigh noise levels by min-SNR; 5 is usual.", default=None, low=1e-3, high=1e3
    )
    noise_offset: float = setting(
        float, "Noise that a whole channel shares: brighter and darker pictures.",
        default=0.0, low=0.0, high=1.0,
    )  # fmt: skip
    # Captions
    caption_dropout: float | None = option(
        float, "Share of pictures shown without words, which guidance needs.", low=0.0, high=1.0
    )
    shuffle_caption: bool = setting(
        bool, "Put the parts of a caption, between commas, in another order.", default=False
    )
    keep_tokens: int = setting(
        int, "Parts that keep their place when the others are shuffled.", default=0, low=0, high=75
    )
    # DreamBooth
    instance_prompt: str | None = setting(
        str, "Words for the subject, as in 'a photo of sks dog'.", default=None
    )
    class_prompt: str | None = setting(
        str, "Words for its kind, as in 'a photo of a dog': keeps what the model knows of it.",
        default=None,
    )  # fmt: skip
    num_class_images: int = setting(
        int, "Pictures of the class, drawn by the model before it learns.",
        default=100, low=1, high=100_000,
    )  # fmt: skip
    prior_loss_weight: float = setting(
        float, "How much the pictures of the class count.", default=1.0, low=0.0, high=100.0
    )
    # Textual inversion
    placeholder_token: str | None = setting(
        str, "The word that is learned, as in '<tulip>'.", default=None
    )
    initializer_token: str | None = setting(
        str, "A known word near to it, where learning starts.", default=None
    )
    num_vectors: int = setting(
        int, "Vectors that the learned word stands for.", default=1, low=1, high=75
    )
    learnable_property: str = setting(
        str, "Whether the word is a thing or a style.", default="object",
        choices=("object", "style"),
    )  # fmt: skip
    # Samples
    sample_prompts: tuple[str, ...] = setting(
        tuple, "Prompts drawn while it learns; none are captions of the data.", default=()
    )
    sample_steps: int | None = option(
        int, "Steps from one set of sample pictures to the next; none is 4 in all.",
        low=1, high=100_000_000,
    )  # fmt: skip
    num_sample_images: int = setting(
        int, "Prompts drawn where none are given; 0 draws none.", default=4, low=0, high=64
    )
    # Output
    save_single_file: bool = setting(
        bool, "Write all weights as one .safetensors as well.", default=False
    )

    @property
    def is_lora(self) -> bool:
        """Tell whether a LoRA learns, and not the weights themselves."""
        return self.method == "lora" or (self.method == "dreambooth" and self.rank is not None)

    def check(self) -> None:
        """Raise BadInput for a value out of range, or for words that do not go together."""
        TrainOptions.check(self)
        if self.method == "dreambooth" and not self.instance_prompt:
            raise BadInput(
                "dreambooth wants instance_prompt: words for the subject with a rare one among "
                "them, as in 'a photo of sks dog'"
            )
        if self.method == "textual-inversion" and not self.placeholder_token:
            raise BadInput(
                "textual-inversion wants placeholder_token: the word to be learned, as in '<tulip>'"
            )
        if self.method == "textual-inversion" and self.train_text_encoder:
            raise BadInput(
                "train_text_encoder does not go with textual-inversion, where one word learns and "
                "nothing else: leave it out"
            )
        for word, method in _OF_ONE_METHOD.items():
            if getattr(self, word) is not None and self.method != method:
                raise BadInput(
                    f"{word} is for method={method!r}, and method is {self.method!r}: give one of "
                    "the two"
                )
        if self.rank is not None and not self.is_lora:
            raise BadInput(f"rank is of a LoRA, and method is {self.method!r}: leave it out")
        if self.save_kohya and not self.is_lora:
            raise BadInput("save_kohya is for a LoRA: leave it out, or give method='lora'")
        if self.cache_latents and not self.center_crop:
            raise BadInput(
                "random crops cannot be kept: give center_crop=True, or cache_latents=False"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerTrainOptions(TrainOptions):
    """Say how to train a captioner."""

    method: str = setting(
        str, "What learns: the weights, or a LoRA on the decoder.",
        default="full", choices=CAPTIONER_METHODS,
    )  # fmt: skip
    freeze: str = setting(
        str, "What does not learn; the bridge between the two always does.",
        default="none", choices=FREEZE,
    )  # fmt: skip
    bridge: str | None = setting(
        str, "How a new captioner is joined.", default=None, choices=(None, *BRIDGES)
    )
    rank: int | None = setting(int, "Of the LoRA.", default=None, low=1, high=4096)
    alpha: float | None = setting(
        float, "The LoRA counts alpha / rank times; none is rank.", default=None, low=1e-6, high=1e6
    )
    lora_layers: str = setting(
        str, "Layers of the decoder with a LoRA: attention, feed-forward, all, or parts of paths.",
        default="attention",
    )  # fmt: skip
    label_smoothing: float = setting(
        float, "Share of certainty that is spread over all words.", default=0.1, low=0.0, high=0.9
    )
    dropout: float = setting(
        float, "Of the decoder while it learns.", default=0.1, low=0.0, high=0.9
    )
    max_length: int | None = option(int, "Most tokens of a caption.", low=4, high=1024)
    cache_encoder: bool = setting(
        bool, "With a frozen encoder, keep what it says of each picture on the disk.", default=True
    )
    self_critical_steps: int = setting(
        int, "Last steps of the run that reward captions by CIDEr.",
        default=0, low=0, high=100_000_000,
    )  # fmt: skip
    self_critical_learning_rate: float = setting(
        float, "Of these steps.", default=1e-5, low=1e-12, high=100.0
    )
    num_sample_captions: int = setting(
        int, "Captions shown while it learns.", default=4, low=0, high=64
    )

    def check(self) -> None:
        """Raise BadInput for a value out of range, or for words that do not go together."""
        TrainOptions.check(self)
        if self.method == "lora" and self.freeze == "decoder":
            raise BadInput("a LoRA is on the decoder, which freeze='decoder' keeps from learning")
        if self.self_critical_steps > self.max_train_steps:
            raise BadInput(
                f"self_critical_steps is {self.self_critical_steps} of {self.max_train_steps} "
                "steps in all: give fewer"
            )
