"""Turn strings into token ids and back: the byte-level BPE of GPT-2, and that of CLIP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from diptych.errors import BadInput, UnsupportedModel

__all__ = ["CLIP_MAX_LENGTH", "END_OF_TEXT", "START_OF_TEXT", "ClipTokenizer", "Gpt2Tokenizer"]

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
CLIP_MAX_LENGTH = 77
_INCOMPLETE = "\ufffd"  # what a character whose bytes are not all there decodes to

_END_OF_WORD = "</w>"
_CLIP_MERGES = 49152 - 256 - 2  # OpenAI's file goes on with merges that CLIP does not use
# Special words, English contractions, runs of letters, single digits, runs of anything else.
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_CLIP_SPECIALS = {
    "bos_token": START_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
}


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

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`."""
        document: str = self._tokenizer.to_str()
        return document

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens.

        Raises `BadInput` for a text that holds half a character.
        """
        return _encoded(self._tokenizer, text)

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


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError) as error:
        raise BadInput(f"the text {text[:60]!r} holds half a character: remove it") from error
    return ids


class ClipTokenizer:
    """Encode and decode with the tokenizer of a CLIP text tower (Radford et al. 2021, section 2.4).

    The ids are those of transformers 5: text is composed (NFC), white space runs become one space,
    letters become small. Where the pad token is a word of its own, every such word in a text gets
    the pad id: Stable Diffusion 2 pads with "!", and was trained so.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        specials: Mapping[str, str | AddedToken] | None = None,
        added: Sequence[AddedToken] = (),
        model_max_length: int = CLIP_MAX_LENGTH,
    ) -> None:
        """Take `specials` by the words of `_CLIP_SPECIALS`, and further `added` tokens in order."""
        named = {**_CLIP_SPECIALS, **(specials or {})}
        words = {name: str(token) for name, token in named.items()}
        self._tokenizer = _clip_pipeline(vocabulary, merges, words["unk_token"])
        self._tokenizer.add_tokens(list(added))
        known = {token.content for token in added}
        # One content may come as a bare word and with flags: the later of the two decides, as in
        # transformers. (An AddedToken never equals a str.)
        late: list[str | AddedToken] = []
        for token in named.values():
            if str(token) not in known and token not in late:
                late.append(token)
        self._tokenizer.add_tokens([_special(token) for token in late])
        self.bos_token_id = self._id_of(words["bos_token"])
        self.eos_token_id = self._id_of(words["eos_token"])
        self.pad_token_id = self._id_of(words["pad_token"])
        self.model_max_length = model_max_length
        if model_max_length < 3:
            raise UnsupportedModel(
                f"the tokenizer's model_max_length is {model_max_length}: a start, an end and a "
                "word between them take 3"
            )
        self._placeholders: dict[int, tuple[int, ...]] = {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        pad_token: str | None = None,
        model_max_length: int | None = None,
    ) -> ClipTokenizer:
        """Read a tokenizer folder, a `tokenizer.json`, or a `vocab.json` with its `merges.txt`.

        Special words come from the files beside it, in transformers' order of precedence: those
        that `special_tokens_map.json` names win over `tokenizer_config.json`, unless the latter
        lists `added_tokens_decoder`. Raises `UnsupportedModel` for files that cannot be read so.
        """
        path = Path(path)
        if path.is_dir():
            has_one = (path / "tokenizer.json").is_file()
            path = path / ("tokenizer.json" if has_one else "vocab.json")
        try:
            vocabulary, merges, in_file = _read_vocabulary(path)
            config = _read_beside(path, "tokenizer_config.json")
            specials, added = _read_specials(path, config, in_file)
            if pad_token is not None:
                specials["pad_token"] = pad_token
            longest = model_max_length or config.get("model_max_length") or CLIP_MAX_LENGTH
            # transformers writes 10^30 where nobody said how long.
            longest = CLIP_MAX_LENGTH if longest > 10**6 else int(longest)
            return cls(vocabulary, merges, specials=specials, added=added, model_max_length=longest)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{path}: {error}") from error
        except Exception as error:  # tokenizers raises bare Exception
            raise UnsupportedModel(
                f"{path}: this tokenizer cannot be read ({error}); fetch or export the model anew"
            ) from error

    @classmethod
    def from_merges(
        cls,
        path: str | Path,
        *,
        pad_token: str = END_OF_TEXT,
        model_max_length: int = CLIP_MAX_LENGTH,
    ) -> ClipTokenizer:
        """Build CLIP's own vocabulary from OpenAI's list of merges, compressed or not.

        Raises `UnsupportedModel` for another file.
        """
        try:
            data = Path(path).read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
            merges = [_pair(line) for line in text.split("\n")[1 : _CLIP_MERGES + 1] if line]
        except (OSError, EOFError, ValueError) as error:
            raise UnsupportedModel(f"{path}: this is no list of merges ({error})") from error
        letters = list(_byte_letters())
        words = [*letters, *(letter + _END_OF_WORD for letter in letters)]
        words += [first + second for first, second in merges]
        words += [START_OF_TEXT, END_OF_TEXT]
        return cls(
            {word: number for number, word in enumerate(words)},
            merges,
            specials={"pad_token": pad_token},
            model_max_length=model_max_length,
        )

    @property
    def vocab_size(self) -> int:
        """Count the tokens, special ones included, placeholders not."""
        return self._tokenizer.get_vocab_size() - len(self._placeholders)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of `text`, without start, end and padding, however many.

        Raises `BadInput` for a text that holds half a character.
        """
        ids = _encoded(self._tokenizer, text)
        if not self._placeholders:
            return ids
        return [row for token in ids for row in self._placeholders.get(token, (token,))]

    def encode(self, text: str) -> list[int]:
        """Return `model_max_length` ids: start, the tokens of `text` that fit, end, padding."""
        return self.frame(self.tokens(text)[: self.model_max_length - 2])

    def frame(self, token_ids: Sequence[int]) -> list[int]:
        """Return `token_ids`, at most `model_max_length - 2`, with start, end and padding."""
        room = self.model_max_length - 2 - len(token_ids)
        assert room >= 0, f"{-room} tokens too many"
        padding = [self.pad_token_id] * room
        return [self.bos_token_id, *token_ids, self.eos_token_id, *padding]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of `token_ids`, words a space apart; special tokens leave no trace."""
        text: str = self._tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True)
        return text.replace(_END_OF_WORD, " ").strip()

    def with_placeholders(self, words: Mapping[str, Sequence[int]]) -> ClipTokenizer:
        """Return a copy in which each of `words` stands for a row of ids (textual inversion).

        The ids are rows that were added to the text encoder's embedding table: `vocab_size` and
        up. A word of letters and digits counts where it stands alone, any other (`<cat>`)
        everywhere. Words already set stay. Raises `BadInput` for a word that is a token already.
        """
        changed = object.__new__(ClipTokenizer)
        changed.__dict__.update(self.__dict__)
        changed._tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        changed._placeholders = dict(self._placeholders)
        for word, ids in words.items():
            if not word.strip() or not ids:
                raise BadInput(f"the placeholder {word!r} stands for {len(ids)} vectors: name both")
            alone = word[0].isalnum() and word[-1].isalnum()
            if changed._tokenizer.token_to_id(word) is not None:
                raise BadInput(f"{word!r} is a token already: give the placeholder another name")
            changed._tokenizer.add_tokens([AddedToken(word, single_word=alone)])
            changed._placeholders[changed._id_of(word)] = tuple(ids)
        return changed

    def _id_of(self, word: str) -> int:
        token_id = self._tokenizer.token_to_id(word)
        assert token_id is not None, word
        return token_id


def _clip_pipeline(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str
) -> Tokenizer:
    model = models.BPE(
        vocab=dict(vocabulary),
        merges=list(merges),
        unk_token=unknown,
        continuing_subword_prefix="",
        end_of_word_suffix=_END_OF_WORD,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> Iterator[str]:
    """Yield the letter that stands for each byte, in the order of CLIP: printable ones first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(0x100 + number) for number in range(256 - len(printable)))


def _read_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[AddedToken]]:
    """Return the vocabulary, the merges, and the added tokens that the file itself lists."""
    if path.name == "vocab.json":
        vocabulary, merges = models.BPE.read_file(str(path), str(path.with_name("merges.txt")))
        return vocabulary, merges, []
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != _END_OF_WORD:
        raise UnsupportedModel(f"this is no CLIP tokenizer: its words do not end in {_END_OF_WORD}")
    merges = [_pair(merge) for merge in model["merges"]]
    added = sorted(described.get("added_tokens", ()), key=lambda token: int(token["id"]))
    return model["vocab"], merges, [_added(token) for token in added]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _read_beside(path: Path, name: str) -> dict[str, Any]:
    beside = path.with_name(name)
    found = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{name} beside it holds no JSON object")
    return found


def _read_specials(
    path: Path, config: Mapping[str, Any], in_file: list[AddedToken]
) -> tuple[dict[str, str | AddedToken], list[AddedToken]]:
    """Return the special words by name, and the added tokens in the order of their ids."""
    named = dict(config)
    if "added_tokens_decoder" in config:
        listed = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        added = [_added(token) for _, token in listed]
    else:
        named.update(_read_beside(path, "special_tokens_map.json"))
        contents = {token.content for token in in_file}
        late = sorted(_read_beside(path, "added_tokens.json").items(), key=lambda item: item[1])
        # What a named token says about itself counts more than its bare id.
        bare = set(_contents(named))
        added = in_file + [
            AddedToken(word, normalized=word not in bare, special=word in bare)
            for word, _ in late
            if word not in contents
        ]
    specials: dict[str, str | AddedToken] = {
        name: named[name] if isinstance(named[name], str) else _special(named[name])
        for name in _CLIP_SPECIALS
        if named.get(name)
    }
    for token in added:
        token.special = token.special or token.content in _contents(specials)
    return specials, added


def _contents(named: Mapping[str, Any]) -> list[str]:
    return [_special(named[name]).content for name in _CLIP_SPECIALS if named.get(name)]


def _added(described: Mapping[str, Any]) -> AddedToken:
    words = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {word: bool(described[word]) for word in words if word in described}
    return AddedToken(described["content"], **flags)


def _special(token: str | Mapping[str, Any] | AddedToken) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    return _added({**token, "special": True})


def _from_vocabulary(vocab: Path, merges: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer
