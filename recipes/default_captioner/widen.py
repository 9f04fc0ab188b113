"""Stage 5: learn to name single things on sharp pictures, and go on saying the same of photos.

    python recipes/default_captioner/widen.py [config.toml]

Of photos the captioner is its own teacher: the captions that it wrote before, with the
probabilities it gave to every word (learning without forgetting: Li and Hoiem 2016). Beside them it
is taught the names of single things, most of which are seen as `detailed` makes them.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
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
    rollout,
    shifted,
    tokenized,
    told,
    trimmed,
    validate,
    word_states,
)
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.text import Gpt2Tokenizer
from diptych.training.memory import bound_kernel_cache
from diptych.training.replay import set_rate
from diptych.training.state import (
    Average,
    Log,
    Pace,
    decayed,
    learning_rate,
    load_state,
    read_average,
    save_state,
)
from pictures import captioned, plain
from pretrain import adamw
from things import coded, detailed, things, viewed

LOOKED_AT = 600  # things of the validation split
LIKELY = 64  # words a place whose probabilities are kept: the others are nearly 0


@dataclass(frozen=True)
class Said:
    """Hold what was said of each photo: tokens, and the likeliest words of every place.

    `inputs` and `targets` [N, T]; `words` and `chances` [N, T, LIKELY].
    """

    inputs: Tensor
    targets: Tensor
    words: Tensor
    chances: Tensor


@torch.no_grad()
def listen(model: VisionEncoderDecoder, photos: Tensor, device: str) -> Said:
    """Caption photos [N, 3, H, W] greedily, as they are."""
    size, parts = model.encoder.config.image_size, []
    for start in range(0, len(photos), 64):
        pixels = plain(photos[start : start + 64].to(device), size)
        with torch.autocast(device, torch.bfloat16):
            cache = image_cache(model, model.encode(pixels))
            inputs, targets = shifted(rollout(model, cache, 1, drawn=False))
            logits = model.decoder.logits(word_states(model, cache, inputs)).float()
        chances, words = logits.softmax(-1).topk(LIKELY)
        parts.append((inputs, targets, words.int(), chances.half()))
    return Said(*(torch.cat(several) for several in zip(*parts, strict=True)))


def named(
    model: VisionEncoderDecoder, pixels: Tensor, names: list[list[str]], tokenizer: Gpt2Tokenizer
) -> float:
    """Return the share of things, seen as in `pixels` [N, 3, H, W], that get one of their names."""
    right, device = 0, pixels.device.type
    model.eval()
    for start in range(0, len(names), 100):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            cache = image_cache(model, model.encode(pixels[start : start + 100]))
            rows = told(rollout(model, cache, 1, drawn=False))
        texts = [tokenizer.decode(ids).strip() for ids in rows]
        pairs = zip(texts, names[start : start + 100], strict=True)
        right += sum(text in several for text, several in pairs)
    return right / len(names)


def sharp_things(config: dict[str, Any], size: int) -> tuple[Tensor, list[list[str]]]:
    """Return validation things as `detailed` makes them of validation photos, and their names."""
    data, generator = Path(config["data"]), torch.Generator().manual_seed(0)
    held = things(data, "val")
    chosen = torch.randperm(len(held.captions), generator=generator)[:LOOKED_AT]
    photos = plain(captioned(data / "flickr8k_224", {"val"}, size).pixels[: len(chosen)], size)
    single = plain(held.pixels[chosen], size)
    torch.manual_seed(0)
    pixels = torch.cat(
        [
            detailed(single[start : start + 50], photos[start : start + 50], generator)
            for start in range(0, len(chosen), 50)
        ]
    )
    return pixels, [held.captions[row] for row in chosen.tolist()]


def photo_loss(logits: Tensor, said: Said, rows: Tensor, places: Tensor, width: int) -> Tensor:
    """Return the cross-entropy to what was said of the photos in `rows`, a word."""
    words, chances, targets = (
        part[rows, :width].flatten(0, 1)[places]
        for part in (said.words, said.chances, said.targets)
    )
    apart = -(chances.float() * logits.log_softmax(-1).gather(1, words.long())).sum(-1)
    spoken = targets != IGNORED
    return (apart * spoken).sum() / spoken.sum()


def main(config: dict[str, Any]) -> None:
    if "widen" not in config:
        return  # a config may leave this stage out
    options, output = config["widen"], Path(config["output"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bound_kernel_cache()
    tokenizer = Gpt2Tokenizer.load(output / "tokenizer.json")
    train, val = (read_split(config, tokenizer, training).to(device) for training in (True, False))
    alone = tokenized(things(Path(config["data"])), tokenizer).to(device)
    coarse = coded(train.pixels.cpu()).to(device)
    size = config["encoder"]["image_size"]
    sharp, names = sharp_things(config, size)
    sharp = sharp.to(device)

    model = new_model(config).to(device)
    start = read_average(Path(options.get("start", output / "refined.safetensors")))
    model.load_state_dict({name: start[name] for name in model.state_dict()})
    model.encoder.to(memory_format=torch.channels_last)
    model.eval()  # statistics of the batches stay those of stage 3
    said = listen(model, train.pixels, device)
    average = Average(model, options["ema_decay"])
    encoder = set(model.encoder.parameters())
    parameters = list(model.named_parameters())
    decay = options["weight_decay"]
    groups = decayed(
        [n for n in parameters if n[1] in encoder], decay, share="encoder_learning_rate"
    )
    groups += decayed([n for n in parameters if n[1] not in encoder], decay, share="learning_rate")
    optimizer = adamw(groups, device, (0.9, 0.98))

    log, state = Log(output / "widen.jsonl"), output / "widen.safetensors"
    first, spent = 0, 0.0
    if state.exists():
        progress = load_state(state, model, average, optimizer)
        first, spent = progress["epoch"] + 1, progress["spent"]
    else:
        tell(log, -1, (0.0, 0.0), model, (val, sharp, names, tokenizer, device))
    per_epoch, count = options["steps"], options["batch_size"]
    pace = Pace(options["epochs"] * per_epoch, options.get("seconds"), spent)
    over, epoch = pace.over(first * per_epoch), first - 1
    while not over:
        epoch += 1
        chance = torch.Generator().manual_seed(config["seed"] * 3000 + epoch)
        draws = torch.Generator(device).manual_seed(config["seed"] * 3000 + epoch)
        torch.manual_seed(config["seed"] * 3000 + epoch)
        losses = torch.zeros(2)
        for index in range(per_epoch):
            photos, singles = (
                torch.randint(len(each.captions), (number,), generator=chance).to(device)
                for each, number in ((train, count), (alone, options["things"]))
            )
            pixels = viewed(
                train.pixels[photos],
                coarse[photos],
                alone.pixels[singles],
                size,
                options,
                draws,
            )
            which = torch.randint(alone.inputs.shape[1], (len(singles),), generator=chance)
            inputs, targets, places = trimmed(
                torch.cat([said.inputs[photos], alone.inputs[singles, which]]),
                torch.cat([said.targets[photos], alone.targets[singles, which]]),
            )
            of_photos = places[places < count * targets.shape[1]]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                cache = image_cache(model, model.encode(pixels))
                written = word_states(model, cache, inputs).flatten(0, 1).index_select(0, places)
                logits = model.decoder.logits(written).float()
            of_said, of_names = logits[: len(of_photos)], logits[len(of_photos) :]
            kept = photo_loss(of_said, said, photos, of_photos, targets.shape[1])
            learnt = F.cross_entropy(
                of_names,
                targets.flatten()[places[len(of_photos) :]],
                ignore_index=IGNORED,
                label_smoothing=options["label_smoothing"],
            )
            done = epoch * per_epoch + index
            rate = learning_rate(done, pace.total(done), options["warmup_steps"])
            set_rate(optimizer, rate, options)
            (kept + options["things_weight"] * learnt).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
            losses += torch.stack([kept.detach(), learnt.detach()]).cpu() / per_epoch
        over = pace.over((epoch + 1) * per_epoch)
        with average.swapped(model):
            tell(log, epoch, tuple(losses.tolist()), model, (val, sharp, names, tokenizer, device))
            save_state(output / "widened.safetensors", model, average, optimizer, {"epoch": epoch})
        save_state(state, model, average, optimizer, {"epoch": epoch, "spent": pace.spent})


def tell(
    log: Log,
    epoch: int,
    losses: tuple[float, ...],
    model: VisionEncoderDecoder,
    held: tuple[Split, Tensor, list[list[str]], Gpt2Tokenizer, str],
) -> None:
    """Score the validation photos and things, and write that down."""
    val, sharp, names, tokenizer, device = held
    scores, texts = validate(model, val, tokenizer, device)
    scores["val_named"] = round(named(model, sharp, names, tokenizer), 4)
    model.eval()
    kept, learnt = (round(each, 4) for each in losses)
    row = {"stage": "widen", "epoch": epoch, "said_loss": kept, "names_loss": learnt}
    log.write(**row, **scores, sample=texts[:3])


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
