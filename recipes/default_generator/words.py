"""Stage 3: the text encoder learns what a sentence says, before it sees a latent.

    python recipes/default_generator/words.py [config.toml]

From the end of the sentence, small heads must name every group's count, size, colour and shape,
the relation and the background of scenes, and the word pieces of other captions. Minutes of
reading save hours of painting: cross-attention finds the parts of a sentence already apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import configs
from diptych.evaluation.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    held_out,
    paraphrase,
    sample_scene,
)
from diptych.models.clip_text import ClipText
from diptych.text import ClipTokenizer
from diptych.training.state import Average, Log, decayed, learning_rate, save_state
from pictures import photographs
from tokenizer import load as load_tokenizer
from train import text_config

# What the heads name, and the choices of each; 0 stands for "not there".
COUNT = 4
ATTRIBUTES = [COUNT, 2 + len(SIZES), 1 + len(COLOURS), 1 + len(SHAPES)]
HEADS = [*ATTRIBUTES, *ATTRIBUTES, 2 + len(RELATIONS), 1 + len(BACKGROUNDS)]
LOG_EVERY = 40


class Reader(nn.Module):
    """Hold the text encoder and the heads that are thrown away afterwards."""

    def __init__(self, text_encoder: ClipText, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.heads = nn.Linear(width, sum(HEADS))
        self.words = nn.Linear(width, vocab_size)


def main() -> None:
    config = configs.asked()
    settings, output = config["words"], Path(config["output"])
    torch.manual_seed(config["seed"])
    tokenizer = load_tokenizer(config)
    encoder = ClipText(text_config(config, tokenizer.vocab_size, tokenizer.eos_token_id))
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.02)
    reader = Reader(encoder, tokenizer.vocab_size)
    average = Average(encoder, settings["ema_decay"])
    optimizer = torch.optim.AdamW(
        decayed(reader.named_parameters(), 0.01), lr=settings["learning_rate"], betas=(0.9, 0.99)
    )
    others = [
        caption
        for domain in ("emoji", "flowers")
        for captions in photographs(Path(config["data"]), domain, "train").captions
        for caption in captions
    ]
    log, total = Log(output / "words.jsonl"), settings["steps"]
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * learning_rate(step, total, 50)
        rng = np.random.default_rng((config["seed"], 3, step))
        found = loss(reader, tokenizer, others, settings["batch_size"], rng)
        optimizer.zero_grad(set_to_none=True)
        (found["scenes"] + 0.3 * found["others"]).backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        average.update(encoder)
        if (step + 1) % LOG_EVERY == 0:
            right = accuracy(reader, tokenizer, np.random.default_rng(step))
            log.write(
                step=step + 1,
                **{name: round(value.item(), 4) for name, value in found.items()},
                held_out_right=round(right, 4),
            )
    save_state(output / "words.safetensors", encoder, average, optimizer, {"step": total})


def loss(
    reader: Reader,
    tokenizer: ClipTokenizer,
    others: list[str],
    size: int,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    drawn = [sample_scene(rng) for _ in range(size)]
    hidden, starts = encode(reader, tokenizer, [paraphrase(scene, rng) for scene in drawn])
    logits = reader.heads(hidden).split(HEADS, dim=-1)
    answers = torch.tensor([answer(scene) for scene in drawn])
    # Every place from the end token on must know: cross-attention sees the filler, too.
    places = torch.arange(hidden.shape[1])[None] >= starts[:, None]
    scenes = torch.stack(
        [
            F.cross_entropy(each[places], answers[:, i, None].expand_as(places)[places])
            for i, each in enumerate(logits)
        ]
    ).sum()
    texts = [others[index] for index in rng.integers(len(others), size=size // 2)]
    hidden, starts = encode(reader, tokenizer, texts)
    pooled = hidden[torch.arange(len(texts)), starts]
    wanted = torch.zeros(len(texts), tokenizer.vocab_size)
    for row, text in enumerate(texts):
        wanted[row, tokenizer.tokens(text)] = 1.0
    missed = F.binary_cross_entropy_with_logits(reader.words(pooled), wanted, reduction="none")
    return {"scenes": scenes, "others": missed.sum(-1).mean()}


def encode(reader: Reader, tokenizer: ClipTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return hidden states [B, T, D] and the place of each sentence's end [B]."""
    ids = torch.tensor([tokenizer.encode(text) for text in texts])
    hidden, _ = reader.text_encoder(ids)
    return hidden, (ids == tokenizer.eos_token_id).int().argmax(-1)


def answer(scene: Scene) -> list[int]:
    """Return what each of the heads should say."""
    second = scene.groups[1] if len(scene.groups) == 2 else None
    joined = (2 + RELATIONS.index(scene.relation)) if scene.relation else int(second is not None)
    background = 1 + BACKGROUNDS.index(scene.background) if scene.background else 0
    return [*_attributes(scene.groups[0]), *_attributes(second), joined, background]


def _attributes(group: Group | None) -> list[int]:
    if group is None:
        return [0, 0, 0, 0]
    size = 2 + SIZES.index(group.size) if group.size else 1
    colour, shape = list(COLOURS).index(group.colour), SHAPES.index(group.shape)
    return [group.count, size, 1 + colour, 1 + shape]


@torch.no_grad()
def accuracy(reader: Reader, tokenizer: ClipTokenizer, rng: np.random.Generator) -> float:
    """Return the share of held-out scenes of which every head is right."""
    drawn = [sample_scene(rng, held=True) for _ in range(200)]
    assert all(held_out(scene) for scene in drawn)
    hidden, starts = encode(reader, tokenizer, [paraphrase(scene, rng) for scene in drawn])
    logits = reader.heads(hidden[torch.arange(len(drawn)), starts]).split(HEADS, dim=-1)
    said = torch.stack([each.argmax(-1) for each in logits], dim=-1)
    wanted = torch.tensor([answer(scene) for scene in drawn])
    return (said == wanted).all(-1).float().mean().item()


if __name__ == "__main__":
    main()
