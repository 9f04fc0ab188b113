"""Find the tokenizer of a text encoder, open it, and copy it with all that belongs to it."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UnsupportedModel
from diptych.text import END_OF_TEXT, START_OF_TEXT, ClipTokenizer

__all__ = ["CLIP_MERGES", "CLIP_VOCABULARY", "TokenizerFiles", "copy_tokenizer", "find_tokenizer"]

# For files that carry no tokenizer: that of OpenAI's CLIP, which all published ones use.
CLIP_MERGES = (
    Path(__file__).resolve().parent / "embedded" / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
)
CLIP_VOCABULARY = 49408
_MERGES = CLIP_VOCABULARY - 512 - 2

_BESIDE = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Say where a tokenizer is: `tokenizer.json`, `vocab.json` or a list of merges.

    `pad_token` and `model_max_length` None are as the files beside `path` say.
    """

    path: Path
    pad_token: str | None = None
    model_max_length: int | None = None

    def open(self) -> ClipTokenizer:
        """Read it; `UnsupportedModel` where it is none of CLIP's."""
        if self.path == CLIP_MERGES:
            return ClipTokenizer.from_merges(
                self.path,
                pad_token=self.pad_token or END_OF_TEXT,
                model_max_length=self.model_max_length or 77,
            )
        return ClipTokenizer.load(
            self.path, pad_token=self.pad_token, model_max_length=self.model_max_length
        )


def find_tokenizer(folder: Path) -> TokenizerFiles:
    """Return the tokenizer in `folder`, else `UnsupportedModel`."""
    if (path := folder / "tokenizer.json").is_file():
        return TokenizerFiles(path)
    if (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return TokenizerFiles(path)
    raise UnsupportedModel(
        f"{folder.name}/ has no tokenizer: it needs a tokenizer.json, or a vocab.json and a "
        "merges.txt"
    )


def copy_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """Write a tokenizer to `folder`, where `find_tokenizer` and transformers find it."""
    folder.mkdir(parents=True, exist_ok=True)
    if files.path == CLIP_MERGES:
        _write_clip(files, folder)
        return
    for name in _BESIDE:
        source = files.path.with_name(name)
        if source == files.path or source.is_file():
            (folder / name).write_bytes(source.read_bytes())
    config = folder / "tokenizer_config.json"
    if not config.is_file() or files.pad_token or files.model_max_length:
        document = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        _write(config, {**document, **_config(files)})
        if files.pad_token and (named := folder / "special_tokens_map.json").is_file():
            _write(named, {**json.loads(named.read_text("utf-8")), "pad_token": files.pad_token})


def _write_clip(files: TokenizerFiles, folder: Path) -> None:
    lines = gzip.decompress(files.path.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : _MERGES + 1]
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters += range(0x100, 0x100 + 256 - len(letters))
    words = [*map(chr, letters), *(f"{chr(letter)}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges] + [START_OF_TEXT, END_OF_TEXT]
    _write(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    config = _config(files)
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", {k: v for k, v in config.items() if v in words})


def _config(files: TokenizerFiles) -> dict[str, Any]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": files.pad_token or END_OF_TEXT,
        "model_max_length": files.model_max_length or 77,
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", "utf-8")
