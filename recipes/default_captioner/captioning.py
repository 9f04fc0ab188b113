"""Hold what the captioning stages share: model, batches, generating, scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.evaluation.caption_metrics import score_captions
from diptych.models.gpt2 import Gpt2Config
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.text import Gpt2Tokenizer
from pictures import Captioned, captioned, clean, plain
from pretrain import encoder_config, initialise

START = 0  # the tokenizer's first token begins, ends and pads a caption
IGNORED = -100
MAX_LENGTH = 24


def model_config(config: dict[str, Any], dropout: float) -> VisionEncoderDecoderConfig:
    decoder = Gpt2Config(**config["decoder"], add_cross_attention=False, dropout=dropout)
    return VisionEncoderDecoderConfig(encoder_config(config), decoder, bridge="prefix")


def new_model(config: dict[str, Any], dropout: float = 0.0) -> VisionEncoderDecoder:
    model = VisionEncoderDecoder(model_config(config, dropout))
    initialise(model)
    return model


def take_encoder(model: VisionEncoderDecoder, weights: dict[str, Tensor]) -> None:
    """Start the encoder from stage 1; positions are interpolated to the larger picture."""
    encoder = {
        name.removeprefix("encoder."): value
        for name, value in weights.items()
        if name.startswith("encoder.")
    }
    name = "embeddings.position_embeddings"
    encoder[name] = grown_positions(encoder[name], model.encoder.config.num_patches)
    model.encoder.load_state_dict(encoder)


def grown_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Interpolate position embeddings [1, 1 + n, D] to [1, 1 + num_patches, D]."""
    first, patches = positions[:, :1], positions[:, 1:]
    before, after = round(patches.shape[1] ** 0.5), round(num_patches**0.5)
    grid = patches.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (after, after), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


@dataclass(frozen=True)
class Split:
    """Hold photos, their cleaned captions and those captions as token ids."""

    photos: Captioned
    captions: list[list[str]]
    token_ids: list[list[list[int]]]


def read_split(config: dict[str, Any], tokenizer: Gpt2Tokenizer, training: bool) -> Split:
    data, size = Path(config["data"]), config["train"]["stored_size"]
    photos = captioned(data / "flickr8k_224", {"train", "extra"} if training else {"val"}, size)
    if training:
        more = captioned(data / "pascal_sentences_224", {"train"}, size)
        photos = Captioned(torch.cat([photos.pixels, more.pixels]), photos.captions + more.captions)
    captions = [[clean(caption) for caption in several] for several in photos.captions]
    ids = [[tokenizer.encode(c)[: MAX_LENGTH - 1] for c in several] for several in captions]
    return Split(photos, captions, ids)


def caption_batch(
    chosen: list[list[list[int]]], each: int, chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [photos * each, T]; photos with fewer captions repeat some."""
    rows = []
    for captions in chosen:
        order = torch.randperm(max(len(captions), each), generator=chance)[:each]
        rows += [captions[int(i) % len(captions)] for i in order]
    return padded(rows)


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Shift captions into inputs (start first) and targets (end last), padded on the right."""
    longest = max(map(len, rows)) + 1
    inputs = torch.full((len(rows), longest), START)
    targets = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        inputs[index, 1 : len(row) + 1] = torch.tensor(row)
        targets[index, : len(row)] = torch.tensor(row)
        targets[index, len(row)] = START
    return inputs, targets


def image_cache(model: VisionEncoderDecoder, prefix_embeds: Tensor) -> Tensor:
    """Run the decoder over the picture alone: [L, 2, B, heads, P, d], shared by its captions."""
    nothing = torch.zeros(len(prefix_embeds), 0, dtype=torch.long, device=prefix_embeds.device)
    _, cache, _ = model.decoder(nothing, prefix_embeds=prefix_embeds)
    return cache


def word_states(model: VisionEncoderDecoder, cache: Tensor, inputs: Tensor) -> Tensor:
    """Return [N, T, D] for captions `inputs` [N, T] behind the pictures of `cache`, N // B each."""
    each = len(inputs) // cache.shape[2]
    hidden: Tensor = model.decoder(inputs, cache.repeat_interleave(each, dim=2))[0]
    return hidden


def word_logits(model: VisionEncoderDecoder, cache: Tensor, inputs: Tensor) -> Tensor:
    """Return [N, T, V] for captions `inputs` [N, T] behind the pictures of `cache`, N // B each."""
    return model.decoder.logits(word_states(model, cache, inputs))


@torch.no_grad()
def rollout(
    model: VisionEncoderDecoder, cache: Tensor, each: int, chance: torch.Generator | None
) -> list[list[int]]:
    """Write `each` captions a picture: drawn where `chance` is given, else the likeliest words.

    `chance` lives on the device of the model.
    """
    cache = cache.repeat_interleave(each, dim=2)
    rows: list[list[int]] = [[] for _ in range(cache.shape[2])]
    alive = torch.arange(len(rows), device=cache.device)  # which row each line of the cache writes
    new = torch.full((len(rows), 1), START, device=cache.device)
    for _ in range(MAX_LENGTH):
        hidden, cache, _ = model.decoder(new, cache)
        logits = model.decoder.logits(hidden[:, -1]).float()
        if chance is None:
            chosen = logits.argmax(-1)
        else:
            noise = torch.rand(logits.shape, generator=chance, device=logits.device)
            chosen = (logits - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()).argmax(-1)
        # A finished row writes on until a third of them are: taking it out copies the cache.
        for row, word in zip(alive.tolist(), chosen.tolist(), strict=True):
            rows[row].append(word)
        going = torch.tensor(
            [START not in rows[row] for row in alive.tolist()], device=chosen.device
        )
        if not going.any():
            break
        new = chosen[:, None]
        if going.float().mean() < 2 / 3:
            alive, new, cache = alive[going], new[going], cache[:, :, going]
    return [row[: row.index(START)] if START in row else row for row in rows]


@torch.no_grad()
def validate(
    model: VisionEncoderDecoder, val: Split, tokenizer: Gpt2Tokenizer, device: str
) -> tuple[dict[str, float], list[str]]:
    """Caption the validation photos greedily and score them; also the loss a token."""
    model.eval()
    size, texts, total, count = model.encoder.config.image_size, [], 0.0, 0
    for start in range(0, len(val.captions), 125):
        pixels = plain(val.photos.pixels[start : start + 125].to(device), size)
        with torch.autocast(device, torch.bfloat16):
            cache = image_cache(model, model.encode(pixels))
            inputs, targets = padded([c[0] for c in val.token_ids[start : start + 125]])
            logits = word_logits(model, cache, inputs.to(device)).float()
            texts += [tokenizer.decode(ids).strip() for ids in rollout(model, cache, 1, None)]
        targets = targets.to(device)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != IGNORED).sum())
    model.train()
    scores = score_captions(texts, val.captions)
    return {
        "val_loss": round(total / count, 4),
        "val_cider": round(scores.cider_d, 4),
        "val_bleu_4": round(scores.bleu_4, 4),
        "different": len(set(texts)),
    }, texts
