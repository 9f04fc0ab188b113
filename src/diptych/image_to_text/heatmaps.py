"""Find out where a captioner looks: which tokens are a word's, which patches are a picture's."""

from __future__ import annotations

import numpy as np

from diptych.errors import BadInput
from diptych.image_to_text.caption import WORD, Caption
from diptych.text import Gpt2Tokenizer
from diptych.weights.files import ModelFolder

__all__ = ["num_image_tokens", "patch_grid", "tokens_of"]


def tokens_of(
    tokenizer: Gpt2Tokenizer, caption: Caption, written: list[int], word: str | int | None
) -> list[int]:
    """Return which of the tokens `written` are those of a word, by its text or its number.

    None means all words. Raises `BadInput` for what is no word of the caption.
    """
    text = tokenizer.decode(written)
    matches = list(WORD.finditer(text))
    if isinstance(word, int | np.integer) and not isinstance(word, bool):
        matches = matches[word : word + 1] if 0 <= word < len(matches) else []
    elif word is not None:
        if not isinstance(word, str):
            raise BadInput(f"a word is given as a text or its number, not as {word!r}")
        matches = [m for m in matches if m.group().casefold() == word.casefold()][:1]
    tokens = [
        index
        for index, (start, end) in enumerate(tokenizer.spans(written))
        if any(start < match.end() and match.start() < end for match in matches)
    ]
    if not tokens:
        raise BadInput(f"{word!r} is not a word of the caption {caption.text!r}")
    return tokens


def num_image_tokens(model: ModelFolder) -> int:
    """Count what the encoder says of a picture: its patches, CLS, and DeiT's second token."""
    encoder = model.config["encoder"]
    height, width = patch_grid(model)
    return height * width + 1 + bool(encoder.get("distillation_token", False))


def patch_grid(model: ModelFolder) -> tuple[int, int]:
    """Return how many patches a picture has, down and across."""
    encoder = model.config["encoder"]
    side = int(encoder["image_size"]) // int(encoder["patch_size"])
    return side, side
