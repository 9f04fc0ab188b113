"""Stage 2: learn a byte-level BPE from the training captions.

python recipes/default_captioner/tokenizer.py [config.toml]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diptych.text import END_OF_TEXT
from pictures import captioned_rows, clean


def training_captions(data: Path) -> list[str]:
    """Return every cleaned caption that may be trained on."""
    captions = []
    for name, splits in (("flickr8k_224", {"train", "extra"}), ("pascal_sentences_224", {"train"})):
        for row in captioned_rows(data / name, splits):
            captions += [clean(caption) for caption in row["captions"]]
    return captions


def main(config: dict[str, Any]) -> None:
    tokenizer = Tokenizer(models.BPE())
    # A space before the first word: "dog" is one token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config["decoder"]["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    captions = training_captions(Path(config["data"]))
    tokenizer.train_from_iterator(captions, trainer)
    path = Path(config["output"]) / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    tokens = sum(len(tokenizer.encode(caption).ids) for caption in captions)
    words = sum(len(caption.split()) for caption in captions)
    print(f"{path}: {tokenizer.get_vocab_size()} tokens, {tokens / words:.3f} tokens a word")


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
