"""CLIP's tokenizer: the ids of transformers, from every kind of file, in any script."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from diptych.errors import BadInput, UnsupportedModel
from diptych.text import END_OF_TEXT, START_OF_TEXT, ClipTokenizer
from traced import traced_once

MERGES = (
    Path(__file__).resolve().parents[1]
    / "src/diptych/weights/embedded/clip_tokenizer/bpe_simple_vocab_16e6.txt.gz"
)

# Where letters, digits, marks, symbols and control characters of many scripts live.
RANGES = [
    *[(0x20, 0x7E)] * 6,
    *[(0x00, 0x1F), (0x7F, 0xA0), (0xA1, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF)],
    *[(0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F)],
    *[(0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF)],
    *[(0x2000, 0x206F), (0x2070, 0x209F), (0x2150, 0x218F), (0x2460, 0x24FF), (0x2600, 0x27BF)],
    *[(0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFB4F)],
    *[(0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF)],
    *[(0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0100, 0xE01EF), (0x10FFF0, 0x10FFFF)],
]
PIECES = [
    *[
        "don't",
        "we'LL've",
        "it's",
        "'d",
        "!",
        "!!!",
        "wow!",
        "！",
        " ",
        "  ",
        "\t\n",
        "\u3000",
        "\x85",
    ],
    *[START_OF_TEXT, END_OF_TEXT, "<|EndOfText|>", "</w>", "<|", "|>", "1234", "٣٤", "½", "Ⅷ"],
    *[
        "photo",
        "a cat",
        "İstanbul",
        "ΟΔΟΣ",
        "straße",
        "ﬁ",
        "e\u0301",
        "\u1100\u1161\u11a8",
        "\u212b",
    ],
    *[
        "日本語の写真",
        "русский текст",
        "صورة",
        "कुत्ता",
        "👩‍👩‍👧",
        "🇩🇪",
        "🐶🏽",
        "\u200b",
        "\ufeff",
        "\x00",
    ],
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that OpenAI's tokenizer is published in, written without our own code."""
    folder = tmp_path_factory.mktemp("clip")
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    kept = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or b >= 174]
    moved = [b for b in range(256) if b not in kept]
    letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(merge.split()) for merge in merges] + [START_OF_TEXT, END_OF_TEXT]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    return folder


def sentences(count: int, seed: int = 3) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(
            draw.choice(PIECES) if draw.random() < 0.4 else chr(draw.randint(*draw.choice(RANGES)))
            for _ in range(draw.randint(0, 24))
        )
        for _ in range(count)
    ]


def copy(published: Path, folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).symlink_to(published / name)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_same(ours: ClipTokenizer, reference: Any, texts: list[str]) -> None:
    length = ours.model_max_length
    padded = reference(texts, padding="max_length", truncation=True, max_length=length).input_ids
    plain = reference(texts, add_special_tokens=False).input_ids
    for text, ids, bare in zip(texts, padded, plain, strict=True):
        assert ours.tokens(text) == bare, repr(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), repr(text)


@pytest.mark.parametrize("pad_token", traced_once([END_OF_TEXT, "!"]))
def test_ids_of_any_script_are_those_of_transformers(published: Path, pad_token: str) -> None:
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(str(published), pad_token=pad_token)
    ours = ClipTokenizer.from_merges(MERGES, pad_token=pad_token)
    assert ours.vocab_size == 49408
    assert (ours.bos_token_id, ours.eos_token_id) == (49406, 49407)
    assert_same(ours, reference, sentences(1500))


def test_exclamation_marks_are_padding_where_the_pad_token_is_one() -> None:
    ids = ClipTokenizer.from_merges(MERGES, pad_token="!").encode("Hello!!! ")
    assert ids == [49406, 3306, 0, 0, 0, 49407, *[0] * 71]
    ids = ClipTokenizer.from_merges(MERGES).encode("Hello!!! ")
    assert ids == [49406, 3306, 995, *[49407] * 74]


def word(content: str, normalized: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": normalized, **flags}


def typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **word(content, True)}


# What the tokenizer folders of published checkpoints say beside vocab.json and merges.txt.
PUBLISHED = {
    "bare": {},
    "SD 1": {
        "tokenizer_config": {
            "bos_token": typed(START_OF_TEXT), "eos_token": typed(END_OF_TEXT),
            "unk_token": typed(END_OF_TEXT), "pad_token": END_OF_TEXT, "errors": "replace",
            "add_prefix_space": False, "do_lower_case": True, "model_max_length": 77,
        },
        "special_tokens_map": {
            "bos_token": word(START_OF_TEXT, True), "eos_token": word(END_OF_TEXT, True),
            "unk_token": word(END_OF_TEXT, True), "pad_token": END_OF_TEXT,
        },
    },
    "SD 2": {
        "tokenizer_config": {
            "bos_token": typed(START_OF_TEXT), "eos_token": typed(END_OF_TEXT),
            "unk_token": typed(END_OF_TEXT), "pad_token": END_OF_TEXT, "model_max_length": 77,
        },
        "special_tokens_map": {
            "bos_token": word(START_OF_TEXT, True), "eos_token": word(END_OF_TEXT, True),
            "unk_token": word(END_OF_TEXT, True), "pad_token": "!",
        },
    },
    "SDXL 2": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "0": {**word("!", False), "special": True},
                "49406": {**word(START_OF_TEXT, True), "special": True},
                "49407": {**word(END_OF_TEXT, True), "special": True},
            },
            "bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
            "pad_token": "!", "model_max_length": 77,
        },
        "special_tokens_map": {"pad_token": END_OF_TEXT},
    },
    "added words": {
        "tokenizer_config": {"model_max_length": 32, "pad_token": "!"},
        "added_tokens": {"<cat-toy>": 49408, "gelb": 49409},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_folders_read_as_transformers_reads_them(
    published: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import CLIPTokenizer

    folder = copy(published, tmp_path / "tokenizer", **PUBLISHED[kind])
    reference = CLIPTokenizer.from_pretrained(str(folder))
    ours = ClipTokenizer.load(folder)
    texts = [*sentences(150), "a <cat-toy> in GELB and gelber", "wow! a <|EndOfText|> b"]
    assert_same(ours, reference, texts)
    assert ours.model_max_length == min(reference.model_max_length, 77)
    assert ours.pad_token_id == reference.pad_token_id

    # The same again through what transformers 5 writes: tokenizer.json and tokenizer_config.json.
    reference.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    assert_same(ClipTokenizer.load(tmp_path / "saved"), reference, texts)
    assert_same(ClipTokenizer.load(tmp_path / "saved" / "tokenizer.json"), reference, texts)


def test_a_tokenizer_json_of_transformers_4_reads_alike(published: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(str(published), pad_token="!").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    # Padding and truncation were left in by whoever used the tokenizer before saving it.
    described["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    ours = ClipTokenizer.load(tmp_path)
    reference = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert_same(ours, reference, sentences(200))


def test_a_small_vocabulary_with_another_length(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    vocabulary = {w: i for i, w in enumerate([*words, START_OF_TEXT, END_OF_TEXT])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12}))
    reference = CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = ClipTokenizer.load(tmp_path)
    assert ours.tokens("Red tire") == [53, 19, 8, 17, 30]
    # A digit is in no word: it is unknown, and the unknown token is the end.
    assert_same(ours, reference, ["a red tire", "7 reds", "", "r" * 40])
    assert len(ours.encode("")) == 12
    reference.save_pretrained(tmp_path / "saved")
    assert_same(ClipTokenizer.load(tmp_path / "saved"), reference, ["a red tire", "7 reds"])


def test_frame_holds_what_was_cut() -> None:
    ours = ClipTokenizer.from_merges(MERGES, model_max_length=6)
    ids = ours.tokens("one two three four five six")
    assert ours.encode("one two three four five six") == [49406, *ids[:4], 49407]
    assert ours.frame(ids[4:]) == [49406, *ids[4:], 49407, 49407, 49407]


def test_placeholders_stand_for_added_rows() -> None:
    plain = ClipTokenizer.from_merges(MERGES)
    ours = plain.with_placeholders({"<cat>": (49408, 49409), "gelb": [49410]})
    a, photo = plain.tokens("a photo")
    assert ours.tokens("A photo <CAT>, a gelb gelber") == [
        *(a, photo, 49408, 49409, *plain.tokens(","), a, 49410, *plain.tokens("gelber"))
    ]
    assert ours.vocab_size == plain.vocab_size == 49408
    assert plain.tokens("<cat>") != [49408, 49409]
    more = ours.with_placeholders({"<dog>": [49411]})
    assert more.tokens("<cat><dog>") == [49408, 49409, 49411]
    with pytest.raises(BadInput, match="token already"):
        plain.with_placeholders({END_OF_TEXT: [49408]})
    with pytest.raises(BadInput, match="0 vectors"):
        plain.with_placeholders({"<cat>": []})


def test_placeholders_read_as_those_of_diffusers(published: Path) -> None:
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(str(published))
    reference.add_tokens(["<Cat>", "<Cat>_1"])
    ours = ClipTokenizer.from_merges(MERGES).with_placeholders({"<Cat>": (49408, 49409)})
    for text in ("a <cat> and", "<Cat>s", "x<CAT>", "<cat", "<cat>\u0301"):
        spelled = text.replace("<Cat>", "<Cat> <Cat>_1").replace("<cat>", "<cat> <cat>_1")
        spelled = spelled.replace("<CAT>", "<CAT> <CAT>_1")
        assert (
            ours.encode(text)[:20]
            == reference(spelled, padding="max_length", truncation=True, max_length=77).input_ids[
                :20
            ]
        ), text


def test_half_a_character_is_refused() -> None:
    with pytest.raises(BadInput, match="half a character"):
        ClipTokenizer.from_merges(MERGES).tokens("a \ud83d cat")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1, 2", '{"model": {"type": "WordPiece", "vocab": {}, "merges": []}}']
)
def test_unreadable_tokenizer_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"vocab\.json"):
        ClipTokenizer.load(tmp_path / "vocab.json")
    with pytest.raises(UnsupportedModel, match="no list of merges"):
        ClipTokenizer.from_merges(tmp_path / "merges.txt.gz")
