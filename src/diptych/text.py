"""Turn strings into token ids and back: GPT-2's byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from diptych.errors import UnsupportedModel

__all__ = ["END_OF_TEXT", "Gpt2Tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_INCOMPLETE = "\ufffd"  # what a character whose bytes are not all there decodes to


class Gpt2Tokenizer:
    """Encode and decode with the tokenizer of a GPT-2 (Radford et al. 2019, section 2.2)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def load(cls, path: str | Path) -> Gpt2Tokenizer:
        """Read a `tokenizer.json`, or a `vocab.json` with `merges.txt` beside it.

        Raises `UnsupportedModel` where the file cannot be read as one of them.
        """
        path = Path(path)
        try:
            if path.name == "vocab.json":
                return cls(_from_vocabulary(path, path.with_name("merges.txt")))
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise UnsupportedModel(
                f"{path}: this tokenizer cannot be read ({error}); fetch or export the model anew"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Count the tokens, special ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of `token_ids`; special tokens leave no trace."""
        text: str = self._tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True)
        return text

    def stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token adds, never a part of a character."""
        ids: list[int] = []
        told = ""
        for token_id in token_ids:
            ids.append(token_id)
            text = self.decode(ids)
            if text.endswith(_INCOMPLETE):
                continue
            if len(text) > len(told):
                yield text[len(told) :]
                told = text
        rest = self.decode(ids)[len(told) :]
        if rest:
            yield rest

    def spans(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return where in the decoded text each token begins and ends."""
        ends = [len(self.decode(token_ids[: count + 1])) for count in range(len(token_ids))]
        return list(zip([0, *ends[:-1]], ends, strict=True))


def _from_vocabulary(vocab: Path, merges: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer
