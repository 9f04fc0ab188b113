"""Stage 3: teach encoder, bridge and decoder together to describe photos.

    python recipes/default_captioner/train.py [config.toml]

Stop it at any time: it goes on from the last finished epoch.
"""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning import (
    IGNORED,
    Split,
    image_cache,
    new_model,
    read_split,
    take_encoder,
    tokenized,
    trimmed,
    validate,
    word_states,
)
from diptych.text import Gpt2Tokenizer
from diptych.training.memory import bound_kernel_cache
from diptych.training.replay import Replay
from diptych.training.state import decayed, read_average
from epochs import Epochs
from pretrain import adamw
from things import coded, things, viewed

COMMON = 60  # words so frequent that they say nothing of the picture
NUM_WORDS = 600


class Pupil(nn.Module):
    """Join the captioner with a second head that names the words of the captions."""

    def __init__(self, config: dict[str, Any], dropout: float) -> None:
        super().__init__()
        self.model = new_model(config, dropout)
        # Dropped attention would forbid the fused kernel, which is most of the decoder's speed.
        for block in self.model.decoder.h:
            block.attn.dropout = 0.0
        self.words = nn.Linear(config["encoder"]["hidden_size"], NUM_WORDS)

    def forward(self, pixels: Tensor, inputs: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [K, V] at `places` of the captions, and those of the photo's words."""
        hidden = self.model.encoder(pixels)
        cache = image_cache(self.model, self.model.bridge(hidden))
        # Half of a batch is padding: scoring the vocabulary there would be wasted.
        written = word_states(self.model, cache, inputs).flatten(0, 1).index_select(0, places)
        return self.model.decoder.logits(written), self.words(hidden.mean(1))


def word_targets(split: Split) -> Tensor:
    """Return [photos, NUM_WORDS]: the share of a photo's captions that use each telling word."""
    counts = Counter(
        word for several in split.captions for caption in several for word in set(caption.split())
    )
    ranked = [word for word, _ in counts.most_common(COMMON + NUM_WORDS)][COMMON:]
    column = {word: index for index, word in enumerate(ranked)}
    targets = torch.zeros(len(split.captions), NUM_WORDS)
    for row, several in enumerate(split.captions):
        for caption in several:
            for word in set(caption.split()) & column.keys():
                targets[row, column[word]] += 1 / len(several)
    return targets


def teacher(config: dict[str, Any], path: Path) -> Pupil:
    """Load what an earlier run of this stage has learnt, to learn from (Hinton et al. 2015)."""
    loaded = Pupil(config, 0.0)
    loaded.load_state_dict(read_average(path))
    return loaded.eval().requires_grad_(False)


def likelihood(teachers: Sequence[Pupil], pixels: Tensor, inputs: Tensor, places: Tensor) -> Tensor:
    """Return [K, V]: how likely the teachers find each word, on average."""
    with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16):
        heard = [each(pixels, inputs, places)[0].float().softmax(-1) for each in teachers]
    return torch.stack(heard).mean(0)


def main(config: dict[str, Any]) -> None:
    options, output = config["train"], Path(config["output"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config["seed"])
    torch.backends.cudnn.benchmark = True
    bound_kernel_cache()
    tokenizer = Gpt2Tokenizer.load(output / "tokenizer.json")
    train, val = (read_split(config, tokenizer, training).to(device) for training in (True, False))
    targets_of_words = word_targets(train).to(device)
    alone = tokenized(things(Path(config["data"])), tokenizer).to(device)
    coarse = coded(train.pixels.cpu()).to(device)

    pupil = begun(config).to(device)
    pupil.model.encoder.to(memory_format=torch.channels_last)
    teachers = [teacher(config, Path(each)).to(device) for each in options.get("teachers", [])]
    optimizer = adamw(groups_of(pupil, options["weight_decay"]), device, (0.9, 0.98))
    epochs = Epochs("train", config, pupil, optimizer, examples=len(train.captions), best="best")
    learn = Replay(device, enabled=config.get("cuda_graphs", True))(
        step_of(pupil, optimizer, options, teachers)
    )
    size, count, few = config["encoder"]["image_size"], options["batch_size"], options["things"]
    for epoch in epochs:
        chance, losses = epoch.chance, []
        order = torch.randperm(len(train.captions), generator=chance).to(device)
        others = torch.randint(len(alone.captions), (epochs.per_epoch, few), generator=chance)
        others = others.to(device)
        for index in epochs.steps(options):
            chosen, further = order[index * count :][:count], others[index]
            pictures = train.pixels[chosen], coarse[chosen], alone.pixels[further]
            pixels = viewed(*pictures, size, options, epoch.draws)
            inputs, targets = (
                torch.cat([photos[chosen], single[further]]).flatten(0, 1)
                for photos, single in ((train.inputs, alone.inputs), (train.targets, alone.targets))
            )
            told = learn(pixels, targets_of_words[chosen], *trimmed(inputs, targets))
            losses.append([each.clone() for each in told])
        if epochs.is_due():
            with epochs.average.swapped(pupil):
                scores, texts = validate(pupil.model, val, tokenizer, device)
            loss, word_loss = (
                round(float(sum(part)) / epochs.per_epoch, 4) for part in zip(*losses, strict=True)
            )
            said = {"loss": loss, "word_loss": word_loss, **scores, "sample": texts[:3]}
            epochs.keep(scores["val_cider"], **said)


def begun(config: dict[str, Any]) -> Pupil:
    """Return what is to learn, with what earlier stages have left of encoder and decoder."""
    output = Path(config["output"])
    pupil = Pupil(config, config["train"]["dropout"])
    if (pretrained := output / "pretrain.safetensors").exists():
        take_encoder(pupil.model, read_average(pretrained))
    if (read := output / "text.safetensors").exists():
        pupil.model.decoder.load_state_dict(read_average(read))
    return pupil


def groups_of(pupil: Pupil, decay: float) -> list[Any]:
    """Return the parameters of the encoder, and the others, each with a rate of its own."""
    encoder = set(pupil.model.encoder.parameters())
    named = list(pupil.named_parameters())
    groups = decayed([n for n in named if n[1] in encoder], decay, share="encoder_learning_rate")
    return groups + decayed([n for n in named if n[1] not in encoder], decay, share="learning_rate")


def step_of(
    pupil: Pupil,
    optimizer: torch.optim.Optimizer,
    options: dict[str, Any],
    teachers: Sequence[Pupil],
) -> Callable[..., tuple[Tensor, ...]]:
    """Return a step of learning, which returns the losses of the captions and of their words."""

    def step(
        pixels: Tensor, words: Tensor, inputs: Tensor, targets: Tensor, places: Tensor
    ) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            logits, guessed = pupil(pixels, inputs, places)
        logits, wanted = logits.float(), targets.flatten()[places]
        smoothing = options["label_smoothing"]
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORED, label_smoothing=smoothing)
        total = loss
        if teachers:
            said = wanted != IGNORED
            likely = likelihood(teachers, pixels, inputs, places)
            apart = -(likely * logits.log_softmax(-1)).sum(-1)
            share = options["teachers_share"]
            total = (1 - share) * loss + share * (apart * said).sum() / said.sum()
        # Summed over the words and divided by about as many as a photo has.
        word_loss = F.binary_cross_entropy_with_logits(guessed[: len(words)].float(), words)
        word_loss = word_loss * (NUM_WORDS / 10)
        (total + options["word_loss"] * word_loss).backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        return loss.detach(), word_loss.detach()

    return step


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
