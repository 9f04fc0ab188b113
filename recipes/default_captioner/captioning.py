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
MAX_LENGTH = 24  # tokens, the end among them
EACH = 5  # captions a photo


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
    """Hold photos, their cleaned captions and those captions as tokens.

    `inputs` and `targets` [photos, EACH, MAX_LENGTH]: shifted captions (start first, end last),
    padded on the right; a photo with fewer captions repeats some.
    """

    pixels: Tensor
    captions: list[list[str]]
    inputs: Tensor
    targets: Tensor

    def to(self, device: str) -> Split:
        return Split(
            self.pixels.to(device), self.captions, self.inputs.to(device), self.targets.to(device)
        )


def read_split(config: dict[str, Any], tokenizer: Gpt2Tokenizer, training: bool) -> Split:
    data, size = Path(config["data"]), config["train"]["stored_size"]
    photos = captioned(data / "flickr8k_224", {"train", "extra"} if training else {"val"}, size)
    if training:
        more = captioned(data / "pascal_sentences_224", {"train"}, size)
        photos = Captioned(torch.cat([photos.pixels, more.pixels]), photos.captions + more.captions)
    return tokenized(photos, tokenizer)


def tokenized(photos: Captioned, tokenizer: Gpt2Tokenizer) -> Split:
    captions = [[clean(caption) for caption in several] for several in photos.captions]
    inputs = torch.full((len(captions), EACH, MAX_LENGTH), START)
    targets = torch.full((len(captions), EACH, MAX_LENGTH), IGNORED)
    for photo, several in enumerate(captions):
        rows = [tokenizer.encode(caption)[: MAX_LENGTH - 1] for caption in several]
        for place in range(EACH):
            row = rows[place % len(rows)]
            inputs[photo, place, 1 : len(row) + 1] = torch.tensor(row)
            targets[photo, place, : len(row) + 1] = torch.tensor([*row, START])
    return Split(photos.pixels, captions, inputs, targets)


def trimmed(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs and targets [N, T] without common padding, and the places [K] of words.

    On a GPU nothing is cut and all places are scored: steps of one shape can be recorded.
    """
    if targets.device.type == "cuda":
        return inputs, targets, torch.arange(targets.numel(), device=targets.device)
    longest = int((targets != IGNORED).any(0).sum())
    inputs, targets = inputs[:, :longest], targets[:, :longest]
    return inputs, targets, (targets != IGNORED).flatten().nonzero().flatten()


def shifted(written: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets for drawn captions [N, T]; nothing counts behind the first end.

    A caption cut off by the length limit did not choose to end, and has none among its targets.
    """
    ended = (written == START).int().cumsum(1)
    behind = (ended - (written == START).int()) > 0
    first = torch.full_like(written[:, :1], START)
    return torch.cat([first, written[:, :-1]], dim=1), written.masked_fill(behind, IGNORED)


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


@torch.no_grad()
def rollout(model: VisionEncoderDecoder, cache: Tensor, each: int, *, drawn: bool) -> Tensor:
    """Write `each` captions a picture, [B * each, MAX_LENGTH]: drawn, else the likeliest words.

    What stands behind the first START means nothing. Draws come from the default generator.
    """
    cache = cache.repeat_interleave(each, dim=2)
    written = torch.full((cache.shape[2], MAX_LENGTH), START, device=cache.device)
    # On a processor rows leave when they are finished; a GPU goes through without being asked.
    leaving = cache.device.type == "cpu"
    alive = torch.arange(len(written), device=cache.device)  # the row each line of the cache writes
    new = written[:, :1]
    for place in range(MAX_LENGTH):
        hidden, cache, _ = model.decoder(new, cache)
        logits = model.decoder.logits(hidden[:, -1]).float()
        if drawn:
            noise = torch.rand_like(logits)
            logits = logits - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()
        chosen = logits.argmax(-1)
        written[alive, place] = chosen
        new = chosen[:, None]
        if leaving:
            going = (written[alive, : place + 1] != START).all(1)
            if not going.any():
                break
            # Not before a third of them are finished: taking rows out copies the cache.
            if going.float().mean() < 2 / 3:
                alive, new, cache = alive[going], new[going], cache[:, :, going]
    return written


def told(written: Tensor) -> list[list[int]]:
    """Return the tokens of each caption, up to its end."""
    rows = written.tolist()
    return [row[: row.index(START)] if START in row else row for row in rows]


@torch.no_grad()
def validate(
    model: VisionEncoderDecoder, val: Split, tokenizer: Gpt2Tokenizer, device: str
) -> tuple[dict[str, float], list[str]]:
    """Caption the validation photos greedily and score them; also the loss a token."""
    model.eval()
    size, texts, total, count = model.encoder.config.image_size, [], 0.0, 0
    for start in range(0, len(val.captions), 125):
        pixels = plain(val.pixels[start : start + 125].to(device), size)
        inputs, targets = (part[start : start + 125, 0] for part in (val.inputs, val.targets))
        with torch.autocast(device, torch.bfloat16):
            cache = image_cache(model, model.encode(pixels))
            logits = model.decoder.logits(word_states(model, cache, inputs)).float()
            rows = told(rollout(model, cache, 1, drawn=False))
        texts += [tokenizer.decode(ids).strip() for ids in rows]
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
