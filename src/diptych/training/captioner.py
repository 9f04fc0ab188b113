"""Teach a captioner: by the next word, then, where it is asked for, by what people would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diptych.errors import BadInput
from diptych.evaluation.caption_metrics import CiderD, DocumentFrequency, score_captions
from diptych.image_to_text.captioner import Captioner
from diptych.images import Preprocessing, to_pixels
from diptych.models.lora import LowRank, detach
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.models.vit import Layer as ViTLayer
from diptych.runtimes.network import OpenNetworks
from diptych.runtimes.on_torch import torch_networks
from diptych.text import Gpt2Tokenizer
from diptych.training.buckets import Plan
from diptych.training.cache import TensorCache, cache_key, file_mark
from diptych.training.data import Dataset, Item
from diptych.training.lora import DEFAULT_RANK, add_updates, choose_layers, matrices
from diptych.training.memory import checkpoint_blocks
from diptych.training.optimizers import Group
from diptych.training.options import CaptionerTrainOptions
from diptych.training.task import Validation
from diptych.training.workplace import Workplace
from diptych.weights.files import ModelFolder
from diptych.weights.hub import resolve
from diptych.weights.load import load_captioner
from diptych.weights.load_parts import load_parts
from diptych.weights.save import save_captioner

__all__ = ["CaptionerTask", "Opened", "captioner_defaults", "open_captioner"]

_IGNORED = -100  # a target that counts for nothing
_RATES = {"full": 5e-5, "lora": 1e-4}
_DRAWN = 4  # captions of a picture that are compared with each other
# The one caption that validation looks at, whatever the model's own settings say.
_LIKELIEST: dict[str, Any] = {
    "num_beams": 1,
    "do_sample": False,
    "num_return_sequences": 1,
    "min_length": 0,
    "max_new_tokens": None,
}
_LONGEST = 64


def captioner_defaults(options: CaptionerTrainOptions, *, is_new: bool) -> dict[str, Any]:
    """Return what holds for this method where the user says nothing."""
    rate = _RATES[options.method]
    return {"learning_rate": 1e-4 if is_new else rate, "validation_fraction": None}


@dataclass(frozen=True, slots=True)
class Opened:
    """Hold a captioner that is about to learn, and what goes with it."""

    module: VisionEncoderDecoder
    model: ModelFolder
    files: tuple[Path, ...]
    is_joined: bool = False  # of two networks, by a bridge that is new


def open_captioner(
    name: str,
    parts: tuple[str, str] | None,
    options: CaptionerTrainOptions,
    *,
    device: torch.device,
    revision: str | None = None,
) -> Opened:
    """Load the captioner `name`, or join the `parts`, an encoder and a decoder; float32."""
    if parts is not None:
        bridge = options.bridge or "cross-attention"
        module, model = load_parts(*parts, bridge=bridge, device=device, seed=options.seed)
        return Opened(module, model, model.weights, is_joined=True)
    model = resolve(name, revision=revision)
    if options.bridge not in (None, model.config["bridge"]):
        raise BadInput(
            f"{name} is joined by {model.config['bridge']}, and stays so: leave bridge out, or "
            "begin a new captioner with encoder and decoder"
        )
    module = load_captioner(model, device=device, dtype="float32", check_finite=True)
    return Opened(module, model, model.weights)


@dataclass(frozen=True, slots=True)
class _Draw:
    """Hold what one row of a batch shows, and the tokens of its caption without their end."""

    item: Item
    is_flipped: bool
    token_ids: tuple[int, ...]


class CaptionerTask:
    """Learn to say of pictures what is said of them."""

    def __init__(
        self,
        opened: Opened,
        dataset: Dataset,
        options: CaptionerTrainOptions,
        place: Workplace,
    ) -> None:
        """Prepare a run; `options` are resolved."""
        self.options, self.place, self.device = options, place, place.device
        self.module, self.model = opened.module, opened.model
        self._tokenizer = Gpt2Tokenizer.load(self.model.tokenizer)
        self._preprocessing = Preprocessing.from_config(self.model.preprocessing)
        networks = OpenNetworks(
            torch_networks(self.module),
            runtime="torch",
            device=str(place.device),
            dtype="float32",
            reason="it is being trained",
        )
        self._captioner = Captioner(networks, self._tokenizer, self._preprocessing, self.model)
        generation = self.model.generation
        end = generation["eos_token_id"]
        self._start = int(generation["decoder_start_token_id"])
        self._end = int(end[0] if isinstance(end, list) else end)
        self._longest = self._room(options.max_length)
        self._updates: dict[tuple[str, str], LowRank] = {}
        self.groups: Sequence[Group] = self._choose(opened.is_joined)
        _set_dropout(self.module.decoder, options.dropout)
        if options.gradient_checkpointing:
            checkpoint_blocks(self.module.encoder, (ViTLayer,))
        learns = any(each.requires_grad for each in self.module.encoder.parameters())
        is_kept = options.cache_encoder and not learns
        self._cache = TensorCache(place.folder / "cache" / "encoder") if is_kept else None
        self._train = dataset.train
        held = sorted(dataset.validation, key=lambda each: each.digest)
        self._held = held[: options.num_validation_images]
        repeats = [each.repeats for each in self._train]
        self._plan = Plan([0] * len(repeats), options.train_batch_size, options.seed, repeats)
        self.batches_per_epoch = self._plan.batches_per_epoch
        self._tokens: dict[str, tuple[int, ...]] = {}
        self._frequency: DocumentFrequency | None = None
        self._identity = [[path.name, file_mark(path)] for path in opened.files]

    def _room(self, asked: int | None) -> int:
        config = self.module.config
        room = config.decoder.max_position_embeddings
        if config.bridge == "prefix":
            room -= config.num_image_tokens
        if asked is not None and asked > room:
            raise BadInput(f"max_length is {asked}, and the decoder has places for {room}")
        return asked or min(room, _LONGEST)

    # --- what learns --------------------------------------------------------------------------

    def _choose(self, is_joined: bool) -> list[Group]:
        options, module = self.options, self.module
        assert options.learning_rate is not None
        module.requires_grad_(False)
        if options.method == "lora":
            # A bridge that was drawn has to learn, whatever else does.
            new = {name: e for name, e in module.named_parameters() if _is_between(name)}
            chosen = choose_layers({"decoder": module.decoder}, options.lora_layers)
            self._updates = add_updates(
                chosen, options.rank or DEFAULT_RANK, options.alpha, options.seed
            )
            parameters = {**matrices(self._updates), **(new if is_joined else {})}
        else:
            parameters = {
                name: each for name, each in module.named_parameters() if not self._is_frozen(name)
            }
        if not parameters:
            raise BadInput(
                f"freeze={options.freeze!r} leaves nothing to learn: this captioner's bridge has "
                "no weights"
            )
        for each in parameters.values():
            each.requires_grad_(True)
        return [Group(parameters, options.learning_rate)]

    def _is_frozen(self, name: str) -> bool:
        """Tell whether a weight keeps still; those between picture and words never do."""
        if self.options.freeze == "encoder":
            return name.startswith("encoder.")
        is_frozen = self.options.freeze == "decoder" and name.startswith("decoder.")
        return is_frozen and not _is_between(name)

    def rate(self, step: int) -> float:
        """Return what the learning rate is multiplied by: the rewarded steps have their own."""
        options = self.options
        if not self._is_rewarded(step):
            return 1.0
        assert options.learning_rate is not None
        return options.self_critical_learning_rate / options.learning_rate

    def _is_rewarded(self, step: int) -> bool:
        return step >= self.options.max_train_steps - self.options.self_critical_steps

    # --- batches ------------------------------------------------------------------------------

    def losses(self, number: int, rows: slice) -> Tensor:
        """Return what these rows of batch `number` add to its loss."""
        draws = self._draws(number)
        if not draws[rows]:
            return torch.zeros(0)
        self._set_training(True)
        step = number // self.options.gradient_accumulation_steps
        if self._is_rewarded(step):
            return self._rewarded(draws[rows], number)
        # The mean is one over the words of the whole batch, as the reference takes it.
        words = sum(len(draw.token_ids) + 1 for draw in draws)
        found = self._word_losses(draws[rows], self.options.label_smoothing)
        return found * (len(draws) / words)

    def _set_training(self, learns: bool) -> None:
        self.module.train(learns)
        # Its batch statistics are those of far more pictures than are shown now.
        self.module.encoder.eval()

    def _draws(self, number: int) -> list[_Draw]:
        draws = []
        for row, index in enumerate(self._plan.batch(number)):
            rng = np.random.default_rng([self.options.seed, number, row])
            item = self._train[index]
            caption = item.captions[rng.integers(len(item.captions))]
            is_flipped = self.options.random_flip and rng.random() < 0.5
            draws.append(_Draw(item, bool(is_flipped), self._ids(caption)))
        return draws

    def _ids(self, caption: str) -> tuple[int, ...]:
        if caption not in self._tokens:
            ids = self._tokenizer.encode(caption)[: self._longest - 1]
            self._tokens[caption] = tuple(ids)
        return self._tokens[caption]

    def _bridged(self, draws: Sequence[_Draw]) -> Tensor:
        """Return what the decoder takes of the pictures."""
        if self._cache is None:
            return self.module.encode(self._pixels(draws))
        # Wide before they meet: autocast to bfloat16 refuses halves on a processor.
        states = [self._encoded(draw).float() for draw in draws]
        return self.module.connect(torch.stack(states).to(self.device))

    def _encoded(self, draw: _Draw) -> Tensor:
        assert self._cache is not None

        def encode() -> Mapping[str, Tensor]:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                # Half the room; every use reads it back, so that all are rounded alike.
                return {"states": self.module.encoder(self._pixels([draw]))[0].half()}

        key = cache_key(
            picture=draw.item.digest,
            flip=draw.is_flipped,
            preprocessing=self._preprocessing.to_config(),
            weights=self._identity,
            model=self.model.name,
        )
        return self._cache.get(key, encode)["states"]

    def _pixels(self, draws: Sequence[_Draw]) -> Tensor:
        found = []
        for draw in draws:
            image = draw.item.open()
            if draw.is_flipped:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found.append(to_pixels(image, self._preprocessing))
        return torch.from_numpy(np.stack(found)).to(self.device)

    def _word_losses(self, draws: Sequence[_Draw], label_smoothing: float) -> Tensor:
        """Return the cross-entropy of each row's words, summed."""
        inputs, targets = self._padded([(*draw.token_ids, self._end) for draw in draws])
        logits = self.module.score(self._bridged(draws), inputs).float()
        losses = F.cross_entropy(
            logits.transpose(1, 2),
            targets,
            ignore_index=_IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.sum(1)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return inputs, `rows` after the start token, and targets, `rows` themselves: [B, T]."""
        longest = max(map(len, rows))
        inputs = torch.full((len(rows), longest), self._end)
        targets = torch.full((len(rows), longest), _IGNORED)
        for index, row in enumerate(rows):
            inputs[index, 0] = self._start
            inputs[index, 1 : len(row)] = torch.tensor(row[:-1], dtype=torch.long)
            targets[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        return inputs.to(self.device), targets.to(self.device)

    # --- rewarded by CIDEr --------------------------------------------------------------------

    def _rewarded(self, draws: Sequence[_Draw], number: int) -> Tensor:
        """Return losses whose gradient makes captions likelier that people would rather say.

        Self-critical training (Rennie et al. 2017): the score of a drawn caption counts against
        the mean of the others drawn for its picture (Luo 2020, "A better variant").
        """
        seed = (self.options.seed * 1_000_003 + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self._set_training(False)
            drawn = self._drawn_captions(self._bridged(draws), generator)
            self._set_training(True)
        # What was cast without gradients would be taken again with them by an older torch.
        torch.clear_autocast_cache()
        rewards = self._rewards(draws, drawn)
        together = [tokens for each in drawn for tokens in each]
        inputs, targets = self._padded(together)
        _set_dropout(self.module.decoder, 0.0)
        try:
            bridged = self._repeated(self._bridged(draws), _DRAWN)
            logits = self.module.score(bridged, inputs).float()
        finally:
            _set_dropout(self.module.decoder, self.options.dropout)
        spoken = -F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=_IGNORED, reduction="none"
        )
        lengths = (targets != _IGNORED).sum(1)
        losses = -(rewards * (spoken.sum(1) / lengths)).view(len(draws), _DRAWN)
        return losses.mean(1)

    def _repeated(self, bridged: Tensor, times: int) -> Tensor:
        is_prefix = self.module.config.bridge == "prefix"
        return bridged.repeat_interleave(times, dim=0 if is_prefix else 2)

    def _drawn_captions(
        self, bridged: Tensor, generator: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        """Draw captions of each picture, word by word, up to their ends or the longest length."""
        bridged = self._repeated(bridged, _DRAWN)
        is_prefix = self.module.config.bridge == "prefix"
        rows = len(bridged) if is_prefix else bridged.shape[2]
        new = torch.full((rows, 1), self._start, device=self.device)
        alive = torch.ones(rows, dtype=torch.bool)
        past: Tensor | None = None
        words: list[list[int]] = [[] for _ in range(rows)]
        for _ in range(self._longest - 1):
            given = None if is_prefix and past is not None else bridged
            logits, past, _ = self.module.step(new, given, past)
            chances = logits.float().softmax(-1).cpu()
            chosen = torch.multinomial(chances, 1, generator=generator)[:, 0]
            for row in torch.nonzero(alive)[:, 0].tolist():
                alive[row] = int(chosen[row]) != self._end
                words[row].append(int(chosen[row]))
            if not bool(alive.any()):
                break
            new = chosen[:, None].to(self.device)
        tuples = [tuple(each) for each in words]
        return [tuples[row : row + _DRAWN] for row in range(0, rows, _DRAWN)]

    def _rewards(
        self, draws: Sequence[_Draw], drawn: Sequence[Sequence[tuple[int, ...]]]
    ) -> Tensor:
        """Return how much better each caption scores than the others of its picture, [B · n]."""
        if self._frequency is None:
            everything = [[self._closed(c) for c in each.captions] for each in self._train]
            self._frequency = DocumentFrequency.from_references(everything)
        references = [[self._closed(c) for c in draw.item.captions] for draw in draws]
        scorer = CiderD(references, self._frequency)
        scores = torch.tensor(
            [[scorer.score(index, tokens) for tokens in each] for index, each in enumerate(drawn)]
        )
        others = (scores.sum(1, keepdim=True) - scores) / (_DRAWN - 1)
        return (scores - others).flatten().to(self.device)

    def _closed(self, caption: str) -> tuple[int, ...]:
        # Without the end as a word, captions that stop too early would be rewarded.
        return (*self._ids(caption), self._end)

    # --- validation and the end ---------------------------------------------------------------

    def validate(self) -> Validation | None:
        """Return the loss a word of held-out captions, and scores of captions of our own."""
        if not self._held:
            return None
        self._set_training(False)
        sums = torch.zeros(2)
        size = self.options.train_batch_size
        mine = self._held[self.place.workers.rank :: self.place.workers.count]
        for first in range(0, len(mine), size):
            draws = [
                _Draw(item, False, self._ids(item.captions[0]))
                for item in mine[first : first + size]
            ]
            sums[0] += self._word_losses(draws, 0.0).sum().cpu()
            sums[1] += sum(len(draw.token_ids) + 1 for draw in draws)
        self.place.workers.add_up([sums])
        captions = self._captioner.caption(
            [item.open() for item in self._held],
            batch_size=size,
            max_length=self._longest,
            **_LIKELIEST,
        )
        texts = [each.text for each in captions]
        scores = score_captions(texts, [item.captions for item in self._held])
        shown = [
            {"file": item.name, "caption": text, "reference": item.captions[0]}
            for item, text in zip(self._held, texts, strict=True)
        ]
        return Validation(
            float(sums[0] / sums[1]),
            {"cider": scores.cider_d, "bleu_4": scores.bleu_4, "rouge_l": scores.rouge_l},
            merit=scores.cider_d,
            shown={"captions": shown[: self.options.num_sample_captions]},
        )

    def sample(self, step: int) -> None:
        """Show nothing: captions are part of validation."""

    def finish(self) -> list[Path]:
        """Write the captioner, with its LoRA added to the weights."""
        for (_, path), update in self._updates.items():
            layer: Any = self.module.decoder.get_submodule(path)
            with torch.no_grad():
                layer.weight.add_(update.delta().to(layer.weight))
            detach(layer, update)
        target = self.place.folder / "model"
        save_captioner(
            self.module,
            target,
            preprocessing=self._preprocessing.to_config(),
            generation=self.model.generation,
            tokenizer=self.model.tokenizer,
            dtype="float32",
        )
        return [target]


def _is_between(name: str) -> bool:
    """Tell whether a weight is of the bridge, or of what looks across it."""
    return name.startswith("bridge.") or "cross" in name


def _set_dropout(decoder: nn.Module, share: float) -> None:
    for child in decoder.modules():
        if isinstance(child, nn.Dropout):
            child.p = share
        elif isinstance(getattr(child, "dropout", None), float):
            child.dropout = share  # type: ignore[assignment]
