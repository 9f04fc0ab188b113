"""Let a text encoder learn one new word and nothing else (textual inversion, Gal et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diptych.errors import BadInput
from diptych.text import ClipTokenizer

__all__ = ["LearnedWords", "learn_word"]

_TABLE = "text_model.embeddings"


class LearnedWords(nn.Module):
    """Stand in for a table of word vectors: `vectors` [n, D] are its further rows."""

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids [B, T] to vectors [B, T, D]."""
        known = len(self.table.weight)
        words: Tensor = self.table(input_ids.clamp(max=known - 1))
        learned = self.vectors[(input_ids - known).clamp(min=0)].to(words.dtype)
        return torch.where((input_ids >= known)[..., None], learned, words)


def learn_word(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, ClipTokenizer],
    token: str,
    *,
    initializer: str | None,
    num_vectors: int,
    seed: int,
) -> tuple[dict[str, LearnedWords], dict[str, ClipTokenizer]]:
    """Give the encoders a new word, and the tokenizers that know it.

    It begins as the vectors of `initializer`, repeated, or near the mean of all words. Raises
    `BadInput` for a word that is known already.
    """
    generator = torch.Generator().manual_seed(seed)
    tables, knowing = {}, dict(tokenizers)
    for name, encoder in encoders.items():
        place = encoder.get_submodule(_TABLE)
        table = place.token_embedding
        assert isinstance(table, nn.Embedding)
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        tokenizer = tokenizers[tokenizer_name]
        rows = _first_vectors(table, tokenizer, initializer, num_vectors, generator)
        words = LearnedWords(table, rows)
        place.token_embedding = words
        first = len(table.weight)
        ids: Sequence[int] = range(first, first + num_vectors)
        knowing[tokenizer_name] = tokenizer.with_placeholders({token: ids})
        tables[name] = words
    return tables, knowing


def _first_vectors(
    table: nn.Embedding,
    tokenizer: ClipTokenizer,
    initializer: str | None,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    weight = table.weight.detach().float()
    if initializer is not None:
        ids = tokenizer.tokens(initializer)
        if not ids:
            raise BadInput(f"initializer_token is {initializer!r}: give a word that is known")
        return weight[[ids[index % len(ids)] for index in range(count)]].clone()
    spread = weight.std(0)
    drawn = torch.randn(count, weight.shape[1], generator=generator).to(weight.device)
    return weight.mean(0) + spread * drawn
