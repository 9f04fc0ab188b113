"""Stage 2: learn a small vocabulary of word pieces, in the files of a CLIP tokenizer.

python recipes/default_generator/tokenizer.py [config.toml]

`[tokenizer] start` names a generator whose vocabulary is taken instead.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import configs
from diptych.evaluation.scenes import paraphrase, sample_scene
from diptych.text import ClipTokenizer
from diptych.weights.diffusion import resolve_generator
from pictures import photographs

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def main() -> None:
    config = configs.asked()
    folder = Path(config["output"]) / "tokenizer"
    if start := config["tokenizer"].get("start"):
        shutil.copytree(resolve_generator(start).path / "tokenizer", folder, dirs_exist_ok=True)
    else:
        write(folder, merges_of(sentences(config), config["tokenizer"]["vocab_size"]), config)
    tokenizer = load(config)
    for text in ("two red circles left of a blue square", "an emoji of a fox"):
        print(text, tokenizer.tokens(text))


def load(config: dict[str, Any]) -> ClipTokenizer:
    return ClipTokenizer.load(Path(config["output"]) / "tokenizer")


def sentences(config: dict[str, Any]) -> list[str]:
    """Return the training captions, scenes among them."""
    found = []
    for domain in ("emoji", "flowers"):
        for captions in photographs(Path(config["data"]), domain, "train").captions:
            found += captions
    rng = np.random.default_rng(config["seed"])
    return found + [paraphrase(sample_scene(rng), rng) for _ in range(3000)]


def merges_of(texts: list[str], vocab_size: int) -> list[tuple[str, str]]:
    """Learn the merges of a byte-level BPE whose words end in `</w>` (Sennrich et al. 2016)."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2 - 256,  # the trainer knows no second alphabet of word ends
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in pairs][: vocab_size - 514]


def write(folder: Path, merges: list[tuple[str, str]], config: dict[str, Any]) -> None:
    """Write the files that CLIP tokenizers are read from, ids in CLIP's order."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m) for m in merges)]
    words = [*dict.fromkeys(words), BEGIN, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        **specials,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config["tokenizer"]["model_max_length"],
        "do_lower_case": True,
    }
    for name, document in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", specials),
        ("tokenizer_config.json", settings),
    ):
        text = json.dumps(document, ensure_ascii=False, indent=None if name == "vocab.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
