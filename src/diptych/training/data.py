"""Check captioned pictures before anything is trained on them, and split off what is held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.errors import BadImage, BadInput
from diptych.images import open_image
from diptych.training.formats import Example, Problem, read_examples

__all__ = ["Dataset", "DatasetReport", "Item", "prepare", "write_captions"]

_SHOWN = 5
_FEW = 10  # pictures: of fewer, none is held out unless it is asked for
_SIZES = (256, 512, 768, 1024, 2048)

Advance = Callable[[], None]
CaptionAll = Callable[[Sequence["Item"]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Item:
    """Hold a picture that can be read: `digest` is the SHA-256 of its file."""

    name: str
    example: Example
    digest: str
    width: int
    height: int
    captions: tuple[str, ...]

    @property
    def repeats(self) -> int:
        return self.example.repeats

    def open(self) -> Image.Image:
        """Return the picture, upright and in RGB; raises `BadImage` where it changed or went."""
        data = _read(self.example)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise BadImage(self.name, "has changed since the run began: put the old file back")
        return _opened(self.name, data)


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """Say what was found: what is used, what is not, and why."""

    found: int
    train: int
    validation: int
    captions: int
    problems: tuple[Problem, ...]
    duplicates: tuple[tuple[str, str], ...]
    without_caption: tuple[str, ...]
    left_out: int  # of a test split
    sizes: Mapping[str, int]
    examples: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "found": self.found,
            "train": self.train,
            "validation": self.validation,
            "captions": self.captions,
            "unusable": [{"file": each.name, "reason": each.reason} for each in self.problems],
            "duplicates": [list(pair) for pair in self.duplicates],
            "without_caption": list(self.without_caption),
            "left_out": self.left_out,
            "sizes": dict(self.sizes),
            "examples": [{"file": name, "caption": text} for name, text in self.examples],
        }

    def as_text(self) -> str:
        """Return the report as a person reads it."""
        found = f"{self.found} pictures found: {self.train} to train on, {self.validation} held out"
        lines = [f"{found}, {self.captions} captions"]
        if self.left_out:
            lines.append(f"{self.left_out} of a test split are left out")
        lines += _listed("cannot be used", [f"{p.name}: {p.reason}" for p in self.problems])
        lines += _listed("say the same as another", [f"{a} = {b}" for a, b in self.duplicates])
        lines += _listed("have no caption", self.without_caption)
        most = max(self.sizes.values(), default=1)
        lines += [
            f"{name:>12}  {'█' * max(1, round(24 * count / most))} {count}"
            for name, count in self.sizes.items()
        ]
        lines += [f"{name}: {text}" for name, text in self.examples]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Hold what is trained on, what is held out, and how it came to that."""

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    report: DatasetReport

    @property
    def fingerprint(self) -> str:
        """Return what tells this data from other data: contents, captions and the split."""
        parts = [
            [each.digest, each.captions, each.repeats, held]
            for held, group in enumerate((self.train, self.validation))
            for each in group
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepare(
    data: str | Path,
    *,
    validation_fraction: float | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_all: CaptionAll | None = None,
    needs_captions: bool = True,
    advance: Callable[[int], Advance] | None = None,
) -> Dataset:
    """Read and check the pictures of `data`, and hold out `validation_fraction` of them.

    None holds out a tenth, of fewer than 10 pictures none. Which ones depends on their contents
    alone. Pictures that cannot be read, or have no caption, are left out and reported; of equal
    ones one stays, with the captions of all. `caption_all` writes captions where there are none.
    Raises `BadInput` where nothing is left.
    """
    found, problems = read_examples(data, image_column=image_column, caption_column=caption_column)
    wanted = [each for each in found if each.split != "test"]
    step = advance(len(wanted)) if advance is not None else lambda: None
    items: dict[str, Item] = {}
    duplicates: list[tuple[str, str]] = []
    for example in wanted:
        try:
            item = _checked(example)
        except BadImage as error:
            problems.append(Problem(example.name, error.reason))
        else:
            first = items.setdefault(item.digest, item)
            if first is not item:
                duplicates.append((example.name, first.name))
                both = dict.fromkeys((*first.captions, *item.captions))
                items[item.digest] = replace(first, captions=tuple(both))
        step()
    usable, without = _with_captions(list(items.values()), caption_all, needs_captions)
    if not usable:
        raise BadInput(_nothing(data, found, problems, without))
    train, validation = _split(usable, validation_fraction)
    report = DatasetReport(
        found=len(found),
        train=len(train),
        validation=len(validation),
        captions=sum(len(each.captions) for each in usable),
        problems=tuple(problems),
        duplicates=tuple(duplicates),
        without_caption=tuple(without),
        left_out=len(found) - len(wanted),
        sizes=_histogram(usable),
        examples=tuple((e.name, e.captions[0] if e.captions else "") for e in usable[:_SHOWN]),
    )
    return Dataset(tuple(train), tuple(validation), report)


def write_captions(path: Path, model: str) -> CaptionAll:
    """Return what captions pictures with `model` and keeps the captions in `path`, JSON lines.

    What stands there already is taken as it is: the file may be edited, and a run that goes on
    reads the same words again.
    """

    def caption_all(items: Sequence[Item]) -> list[str]:
        from diptych.image_to_text.captioner import Captioner

        known: dict[str, str] = {}
        written = path.read_bytes() if path.is_file() else b""
        for line in written.split(b"\n"):
            try:
                row = json.loads(line)
                known[row["sha256"]] = row["text"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off by a kill: that picture is captioned again
        missing = [each for each in items if each.digest not in known]
        if missing:
            captioner = Captioner.load(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            made = captioner.captions(each.open() for each in missing)
            with path.open("a", encoding="utf-8") as file:
                if written and not written.endswith(b"\n"):
                    file.write("\n")
                for item, caption in zip(missing, made, strict=True):
                    row = {"file_name": item.name, "sha256": item.digest, "text": caption.text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    known[item.digest] = caption.text
        return [known[each.digest] for each in items]

    return caption_all


# --- checks ---------------------------------------------------------------------------------------


def _read(example: Example) -> bytes:
    try:
        return example.source.read()
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise BadImage(example.name, f"cannot be read ({reason})") from error


def _opened(name: str, data: bytes) -> Image.Image:
    try:
        return open_image(data)
    except BadImage as error:
        raise BadImage(name, error.reason) from error


def _checked(example: Example) -> Item:
    data = _read(example)
    width, height = _opened(example.name, data).size
    digest = hashlib.sha256(data).hexdigest()
    return Item(example.name, example, digest, width, height, example.captions)


def _with_captions(
    items: Sequence[Item], caption_all: CaptionAll | None, needs_captions: bool
) -> tuple[list[Item], list[str]]:
    without = [each for each in items if not each.captions]
    if without and caption_all is not None:
        texts = dict(zip((e.digest for e in without), caption_all(without), strict=True))
        items = [
            replace(each, captions=(texts[each.digest],)) if texts.get(each.digest) else each
            for each in items
        ]
        without = [each for each in items if not each.captions]
    if not needs_captions:
        return list(items), []
    return [each for each in items if each.captions], [each.name for each in without]


def _nothing(
    data: str | Path,
    found: Sequence[Example],
    problems: Sequence[Problem],
    without: Sequence[str],
) -> str:
    if without:
        return (
            f"{data}: none of its {len(found)} pictures has a caption: write them beside the "
            "pictures (photo.txt); for a generator the captioner can do it (caption_with, "
            "--caption-with default)"
        )
    if problems:
        first = problems[0]
        return (
            f"{data}: none of its pictures can be used; the first of {len(problems)}, "
            f"{first.name}: {first.reason}"
        )
    return f"{data}: all its pictures belong to a test split, which is never trained on"


def _split(items: Sequence[Item], fraction: float | None) -> tuple[list[Item], list[Item]]:
    """Hold out pictures by content: adding some never moves others from one side to the other."""
    said = {each.example.split for each in items}
    if "validation" in said and fraction is None:
        held = [each for each in items if each.example.split == "validation"]
        train = [each for each in items if each.example.split != "validation"]
        if train:
            return train, held
    if fraction is None:
        fraction = 0.1 if len(items) >= _FEW else 0.0
    held = [each for each in items if int(each.digest[:8], 16) < fraction * 2**32]
    if fraction > 0 and not held and len(items) > 1:
        held = [min(items, key=lambda each: each.digest)]
    if len(held) == len(items):
        held = sorted(held, key=lambda each: each.digest)[: max(1, int(len(items) * fraction))]
        held = held if len(held) < len(items) else []
    names = {each.digest for each in held}
    return [each for each in items if each.digest not in names], held


# --- report ---------------------------------------------------------------------------------------


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = [f"  … and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"{len(names)} {what}:", *(f"  {name}" for name in names[:_SHOWN]), *more]


def _histogram(items: Sequence[Item]) -> dict[str, int]:
    """Count pictures by the side of a square of as many pixels."""
    names = [f"to {size} px" for size in _SIZES] + [f"over {_SIZES[-1]} px"]
    counts: Counter[str] = Counter()
    for each in items:
        side = (each.width * each.height) ** 0.5
        counts[names[sum(side > size for size in _SIZES)]] += 1
    return {name: counts[name] for name in names if counts[name]}
