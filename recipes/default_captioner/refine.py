"""Stage 4: self-critical training (Rennie et al. 2017): reward captions by their CIDEr-D.

    python recipes/default_captioner/refine.py [config.toml]

Several captions are drawn a photo; each is judged against the mean of its siblings, so that the
better ones become likelier. The end of a sentence counts as a word, else captions that break off in
the middle would win. Starts from the best checkpoint of stage 3, or, with `start` "train", from its
last.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning import (
    EACH,
    IGNORED,
    MAX_LENGTH,
    image_cache,
    new_model,
    read_split,
    rollout,
    shifted,
    tokenized,
    told,
    trimmed,
    validate,
    word_states,
)
from diptych.evaluation.caption_metrics import CiderD, tokenize_words
from diptych.text import Gpt2Tokenizer
from diptych.training.memory import bound_kernel_cache
from diptych.training.replay import Replay
from diptych.training.state import decayed, read_average
from epochs import Epochs
from pretrain import adamw
from things import coded, things, viewed

END = "<end>"


class Jury:
    """Score captions by CIDEr-D, in one process a processor where there are many."""

    def __init__(self, captions: Sequence[Sequence[str]], tokenizer: Gpt2Tokenizer) -> None:
        judge = CiderD([[[*tokenize_words(c), END] for c in several] for several in captions])
        self._seat = (judge, tokenizer)
        count = min(14, (os.cpu_count() or 1) - 1)
        # Forked before anything touches a GPU; the judge is inherited, not sent.
        context = multiprocessing.get_context("fork")
        self._pool = context.Pool(count, _take, self._seat) if count > 1 else None

    def score(self, photos: Sequence[int], captions: Sequence[Sequence[int]]) -> Tensor:
        """Return [captions]: that of each, given as tokens, against the references of its photo."""
        pairs = list(zip(photos, captions, strict=True))
        if self._pool is None:
            return torch.tensor([_judged(*self._seat, *pair) for pair in pairs])
        return torch.tensor(self._pool.map(_score, pairs, chunksize=len(pairs) // 28 + 1))


_seated: list[tuple[CiderD, Gpt2Tokenizer]] = []  # those of a process of the pool


def _take(*seat: Any) -> None:
    _seated.append(seat)  # type: ignore[arg-type]


def _score(pair: tuple[int, Sequence[int]]) -> float:
    return _judged(*_seated[-1], *pair)


def _judged(judge: CiderD, tokenizer: Gpt2Tokenizer, photo: int, caption: Sequence[int]) -> float:
    words = tokenize_words(tokenizer.decode(list(caption)))
    return judge.score(photo, [*words, *([END] if len(caption) < MAX_LENGTH else [])])


def advantages(reward: Tensor, each: int) -> Tensor:
    """Return how much better each caption is than the mean of its siblings."""
    grouped = reward.unflatten(0, (-1, each))
    siblings = (grouped.sum(1, keepdim=True) - grouped) / (each - 1)
    return (grouped - siblings).flatten()


def main(config: dict[str, Any]) -> None:
    options, output = config["refine"], Path(config["output"])
    tokenizer = Gpt2Tokenizer.load(output / "tokenizer.json")
    train, val = (read_split(config, tokenizer, training) for training in (True, False))
    jury = Jury(train.captions, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config["seed"])
    torch.backends.cudnn.benchmark = True
    bound_kernel_cache()
    train, val = train.to(device), val.to(device)
    alone = tokenized(things(Path(config["data"])), tokenizer).to(device)
    coarse = coded(train.pixels.cpu()).to(device)

    # Without dropout: what is drawn and what is learnt from must be the same distribution.
    model = new_model(config).to(device)
    start = read_average(output / f"{options['start']}.safetensors")
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in start.items() if k.startswith("model.")}
    )
    model.encoder.to(memory_format=torch.channels_last)
    optimizer = adamw(decayed(model.named_parameters(), 0.0), device, (0.9, 0.98))
    scores, texts = validate(model, val, tokenizer, device)
    epochs = Epochs(
        *("refine", config, model, optimizer),
        examples=len(train.captions),
        salt=2000,
        best="refined",  # what ships where no epoch is better: what there was before
    )
    epochs.begin(scores["val_cider"], **scores, sample=texts[:3])
    size, each = config["encoder"]["image_size"], options["samples"]
    count, few = options["batch_size"], options["things"]
    taught = torch.arange(each, device=device) % EACH  # which captions of a thing
    weight = torch.full((few * each,), options["things_weight"], device=device)
    replay = Replay(device, enabled=config.get("cuda_graphs", True))
    draw, learn = (replay(step) for step in steps_of(model, optimizer, count, each))
    # Statistics of the batches would drift with so few steps: keep those of stage 3.
    model.eval()
    for epoch in epochs:
        order, rewards = torch.randperm(len(train.captions), generator=epoch.chance), []
        others = torch.randint(len(alone.captions), (epochs.per_epoch, few), generator=epoch.chance)
        others = others.to(device)
        for index in epochs.steps():
            photos, further = order[index * count :][:count], others[index]
            chosen = photos.to(device)
            pictures = train.pixels[chosen], coarse[chosen], alone.pixels[further]
            (written,) = draw(viewed(*pictures, size, options, epoch.draws))
            reward = jury.score(photos.repeat_interleave(each).tolist(), told(written))
            gain = torch.cat([advantages(reward, each).to(device), weight])
            inputs, targets = (
                torch.cat([drawn, single[further][:, taught].flatten(0, 1)])
                for drawn, single in zip(
                    shifted(written), (alone.inputs, alone.targets), strict=True
                )
            )
            learn(*trimmed(inputs, targets), gain)
            rewards.append(float(reward.mean()))
        if epochs.is_due():
            with epochs.average.swapped(model):
                scores, texts = validate(model, val, tokenizer, device)
            model.eval()
            mean = round(sum(rewards) / len(rewards), 4)
            epochs.keep(scores["val_cider"], reward=mean, **scores, sample=texts[:3])


Step = Callable[..., tuple[Tensor, ...]]


def steps_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int, each: int
) -> tuple[Step, Step]:
    """Return how to draw `each` captions of the first `count` pictures, and to learn from them."""
    seen: list[Tensor] = []  # the cache of the pictures, from drawing to learning

    def draw(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            seen[:] = [image_cache(model, model.encode(pixels))]
            return (rollout(model, seen[0][:, :, :count].detach(), each, drawn=True),)

    def learn(inputs: Tensor, targets: Tensor, places: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            # A half is padding: scoring the vocabulary there would be wasted.
            written = word_states(model, seen[0], inputs).flatten(0, 1).index_select(0, places)
            logits = model.decoder.logits(written).float()
        wanted = targets.flatten()[places]
        cost = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")
        gains = gain[:, None].expand(targets.shape).flatten()[places]
        ((cost * gains).sum() / (wanted != IGNORED).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return ()

    return draw, learn


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
