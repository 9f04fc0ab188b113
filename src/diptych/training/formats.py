"""Read captioned pictures in the conventions that people keep them in.

Known are `metadata.jsonl`, `.csv` and `.parquet` (imagefolder), JSON lines with a list of captions,
text files beside the pictures, kohya's folders `10_name`, WebDataset shards, and parquet tables
that hold the pictures themselves. A folder without any captions is read too: they can be written.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from diptych.errors import BadInput, MissingExtra
from diptych.inputs import PICTURE_SUFFIXES, at_home

__all__ = ["Example", "Problem", "Source", "read_examples"]

_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.jsonl")
_FILE_COLUMNS = ("file_name", "file", "image", "image_path", "path", "filename")
_TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "sentences")
_SIDECARS = (".txt", ".caption")
_KOHYA = re.compile(r"(\d{1,5})_(.+)", re.DOTALL)
_MOST_REPEATS = 1000  # more is a year, or another number
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLITS)})(?=[-_.]|$)")
_MOST_TEXT = 1 << 20  # bytes of one caption file


class Source(Protocol):
    """Give the bytes of a picture."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Stretch:
    """Hold a file, or `size` bytes of it from `offset`."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Cell:
    """Hold one picture of a parquet table."""

    path: Path
    row: int
    column: str

    def read(self) -> bytes:
        value = _column(self.path, self.column)[self.row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value if isinstance(value, bytes) else b""


@dataclass(frozen=True, slots=True)
class Example:
    """Hold a picture and what is said of it; `split` is train, validation, test or unsaid."""

    name: str
    source: Source
    captions: tuple[str, ...] = ()
    repeats: int = 1
    split: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Say which file cannot be used, and why."""

    name: str
    reason: str


@dataclass
class _Reading:
    """Hold the words for columns, and what was found wrong on the way.

    `splits_by_name` says that files of several pictures tell by their names what they are for.
    """

    image_column: str | None = None
    caption_column: str | None = None
    splits_by_name: bool = False
    problems: list[Problem] = field(default_factory=list)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the captions of a row; None where it has no such column."""
        columns = (self.caption_column,) if self.caption_column else _TEXT_COLUMNS
        for column in columns:
            if column in row:
                value = row[column]
                several = value if isinstance(value, list | tuple) else [value]
                return tuple(_clean(text).strip() for text in several if isinstance(text, str))
        return None

    def check_columns(self, path: Path, row: Mapping[str, Any], texts: object) -> None:
        """Raise `BadInput` for a column of captions that a table was said to have and has not."""
        if self.caption_column and texts is None and path.suffix.lower() != ".jsonl":
            known = ", ".join(map(str, row))[:200]
            raise BadInput(
                f"{path}: has the columns {known}, none is {self.caption_column!r}: give another "
                "caption_column"
            )

    def file(self, row: Mapping[str, Any]) -> str | None:
        columns = (self.image_column,) if self.image_column else _FILE_COLUMNS
        for column in columns:
            if isinstance(row.get(column), str):
                return str(row[column])
        return None


def read_examples(
    data: str | Path, *, image_column: str | None = None, caption_column: str | None = None
) -> tuple[list[Example], list[Problem]]:
    """Return the pictures of `data`, a folder, table or shard, and what cannot be used.

    No picture is opened. The order is by name, whatever the file system gives. Raises `BadInput`
    where there is nothing of the kind, `MissingExtra` for parquet without pyarrow.
    """
    data = at_home(data)
    reading = _Reading(image_column, caption_column)
    try:
        if data.is_file():
            examples = list(_from_file(data, reading))
        elif data.is_dir():
            reading.splits_by_name = True
            examples = list(_from_folder(data, reading))
        else:
            raise BadInput(f"{data}: there is no such folder or file of pictures")
    except OSError as error:
        raise BadInput(f"{data}: cannot be read ({error.strerror or error})") from error
    if not examples and not reading.problems:
        raise BadInput(
            f"{data}: holds no pictures: give a folder of pictures, a metadata.jsonl, a .tar of "
            "WebDataset or a .parquet"
        )
    return examples, reading.problems


def _from_file(path: Path, reading: _Reading) -> Iterator[Example]:
    kinds = {".jsonl": _table, ".csv": _table, ".tar": _shard, ".parquet": _table}
    if path.suffix.lower() not in kinds:
        raise BadInput(
            f"{path}: give a folder, or a file that ends in .jsonl, .csv, .parquet or .tar"
        )
    yield from kinds[path.suffix.lower()](path, reading)


def _from_folder(folder: Path, reading: _Reading) -> Iterator[Example]:
    for tables in (_tables_in([folder]), _tables_in(_folders(folder))):
        if tables:
            found = [each for table in tables for each in _table(table, reading)]
            yield from found
            _tell_unnamed(folder, found, reading)
            return
    # As the Hub lays out data sets: in `data`, or in a folder for each split.
    below = [each for each in _folders(folder) if each.name.lower() in {"data", *_SPLITS}]
    for ending, read in ((".tar", _shard), (".parquet", _table)):
        if files := [
            file
            for each in (folder, *below)
            for file in sorted(each.glob(f"*{ending}"))
            if not file.name.startswith(".")
        ]:
            for file in files:
                yield from read(file, reading)
            return
    counted = {
        each: match
        for each in _folders(folder)
        if (match := _KOHYA.fullmatch(each.name)) and int(match[1]) <= _MOST_REPEATS
    }
    if counted:
        yield from _kohya(folder, counted, reading)
    else:
        yield from _beside(folder, folder, reading)


def _tell_unnamed(folder: Path, found: Iterable[Example], reading: _Reading) -> None:
    """Tell of pictures that lie in `folder` and that no table names: they are left out."""
    sources = (each.source for each in found)
    named = {os.path.normpath(each.path) for each in sources if isinstance(each, Stretch)}
    left = [each for each in _pictures_below(folder) if os.path.normpath(each) not in named]
    if left:
        first = _clean(str(left[0].relative_to(folder)))
        others = f", nor {len(left) - 1} more" if len(left) > 1 else ""
        reading.problems.append(Problem(first, f"is named by no table{others}: left out"))


def _kohya(
    folder: Path, counted: Mapping[Path, re.Match[str]], reading: _Reading
) -> Iterator[Example]:
    """Read folders that tell how often they count; what lies beside them is told of."""
    for each, match in counted.items():
        repeats, words = int(match[1]), (_clean(match[2]).strip(),)
        found = list(_beside(each, folder, reading, repeats=repeats, otherwise=words))
        if repeats:
            yield from found
        elif found:
            reading.problems.append(Problem(_clean(each.name), "counts 0 times, and is left out"))
    first = min(_clean(each.name) for each in counted)
    reason = f"is left out beside folders such as {first}: name it so too, or move it elsewhere"
    others = [each for each in _folders(folder) if each not in counted]
    others += [each for each in sorted(folder.iterdir()) if _is_picture(each)]
    for other in others:
        if not other.name.startswith(".") and (other.is_file() or _pictures_below(other)):
            reading.problems.append(Problem(_clean(other.name), reason))


def _folders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir())


def _tables_in(folders: Iterable[Path]) -> list[Path]:
    found = []
    for folder in folders:
        found += [folder / name for name in _TABLES if (folder / name).is_file()][:1]
    return found


# --- tables ---------------------------------------------------------------------------------------


def _table(path: Path, reading: _Reading) -> Iterator[Example]:
    """Read a table with one row a picture; rows of the same file are one picture."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, reading)
        return
    rows = _json_rows(path, reading) if suffix == ".jsonl" else _csv_rows(path)
    found: dict[str, tuple[list[str], str, int]] = {}
    for number, row in rows:
        name = reading.file(row)
        texts = reading.texts(row)
        reading.check_columns(path, row, texts)
        if name is None:
            wanted = reading.image_column or ", ".join(_FILE_COLUMNS[:3])
            reading.problems.append(
                Problem(f"{path.name}, line {number}", f"names no picture (column {wanted})")
            )
            continue
        if not _is_inside(name):
            problem = Problem(_clean(name)[:100], "leads out of the folder of the data")
            reading.problems.append(problem)
            continue
        captions, _, _ = found.setdefault(name, ([], _split(row, path), number))
        captions += [text for text in texts or () if text not in captions]
    for name, (captions, split, _) in found.items():
        kept = tuple(text for text in captions if text)
        place = path.parent / name
        if "\\" in name and not place.exists():  # written on Windows
            place = path.parent / name.replace("\\", "/")
        yield Example(_clean(name), Stretch(place), kept, split=split)


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name.replace("\\", "/"))
    return not pure.is_absolute() and ".." not in pure.parts


def _split(row: Mapping[str, Any], path: Path) -> str:
    said = row.get("split")
    if isinstance(said, str):
        return _SPLITS.get(said.lower(), "")
    return _SPLITS.get(path.parent.name.lower(), "")


def _split_of_file(path: Path, reading: _Reading) -> str:
    """Return what the name of a shard tells, as in train-00000-of-00002.parquet."""
    told = _SPLIT_FILE.match(path.stem.lower()) if reading.splits_by_name else None
    return _SPLITS[told[1]] if told else _SPLITS.get(path.parent.name.lower(), "")


def _clean(text: str) -> str:
    """Return `text` without what no file can hold: names of bytes, halves of letters."""
    return text.encode("utf-8", "ignore").decode()


def _json_rows(path: Path, reading: _Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    # By line feeds alone: a text may hold other characters that end lines elsewhere.
    for number, line in enumerate(_text(path, whole=True).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, row
        else:
            reading.problems.append(Problem(f"{path.name}, line {number}", "is no JSON object"))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = io.StringIO(_text(path, whole=True), newline="")
    try:
        for number, row in enumerate(csv.DictReader(lines), 2):
            yield number, dict(row)
    except csv.Error as error:
        raise BadInput(f"{path}: is no table of comma-separated values ({error})") from error


def _text(path: Path, *, whole: bool = False) -> str:
    """Return the text of a file; raises `BadInput` for another encoding than UTF-8 or UTF-16."""
    data = path.read_bytes()
    if not whole and len(data) > _MOST_TEXT:
        raise BadInput(f"{path.name}: has {len(data) >> 20} MB, too many for a caption")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path.name}: is not UTF-8 (byte {error.start}): save it in this encoding"
        ) from error


# --- text files beside pictures -------------------------------------------------------------------


def _beside(
    folder: Path,
    root: Path,
    reading: _Reading,
    *,
    repeats: int = 1,
    otherwise: tuple[str, ...] = (),
) -> Iterator[Example]:
    for picture in _pictures_below(folder):
        name = _clean(str(picture.relative_to(root)))
        try:
            captions = _captions_beside(picture)
        except BadInput as error:
            reading.problems.append(Problem(name, str(error)))
            continue
        first, *rest = picture.relative_to(root).parts
        split = _SPLITS.get(first.lower(), "") if rest else ""
        yield Example(name, Stretch(picture), captions or otherwise, repeats, split)


def _pictures_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if _is_picture(file)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()


def _captions_beside(picture: Path) -> tuple[str, ...]:
    for ending in _SIDECARS:
        # `photo.txt`, and for those who keep the whole name, `photo.jpg.txt`.
        for file in (picture.with_suffix(ending), picture.with_name(picture.name + ending)):
            if file.is_file():
                lines = (_clean(line).strip() for line in _text(file).splitlines())
                return tuple(dict.fromkeys(line for line in lines if line))
    return ()


# --- WebDataset -----------------------------------------------------------------------------------


def _shard(path: Path, reading: _Reading) -> Iterator[Example]:
    """Read a tar whose neighbours of one key belong together; pictures are found by offset."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if member.isfile() and key:
                    members.setdefault(f"{folder}/{key}".lstrip("/"), {})[ending.lower()] = member
            for key, parts in members.items():
                for name, own in _keyed(key, parts):
                    yield from _sample(path, tar, name, own, reading)
    except tarfile.TarError as error:
        raise BadInput(
            f"{path}: is no uncompressed tar, or a damaged one ({error}): write it anew"
        ) from error


def _keyed(
    key: str, parts: dict[str, tarfile.TarInfo]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the samples of a key: one, unless dots in names hide what its pictures are."""
    dotted = [each for each in parts if f".{each.rpartition('.')[2]}" in PICTURE_SUFFIXES]
    if not dotted or any("." not in each for each in dotted):
        yield key, parts
        return
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    for each, member in parts.items():
        middle, _, ending = each.rpartition(".")
        found.setdefault(f"{key}.{middle}", {})[ending] = member
    yield from found.items()


def _sample(
    path: Path,
    tar: tarfile.TarFile,
    key: str,
    parts: Mapping[str, tarfile.TarInfo],
    reading: _Reading,
) -> Iterator[Example]:
    pictures = [each for each in parts if f".{each}" in PICTURE_SUFFIXES]
    if not pictures:
        return
    picture, name = parts[pictures[0]], _clean(f"{path.name}:{key}")
    source = Stretch(path, picture.offset_data, picture.size)
    try:
        captions: tuple[str, ...] = ()
        for ending in ("txt", "caption", "json"):
            file = tar.extractfile(parts[ending]) if ending in parts else None
            if file is None or captions:
                continue
            text = file.read(_MOST_TEXT).decode("utf-8-sig")
            if ending != "json":
                captions = tuple(line.strip() for line in text.splitlines() if line.strip())
            else:
                row = json.loads(text)
                texts = reading.texts(row) if isinstance(row, dict) else None
                captions = tuple(each for each in texts or () if each)
    except (ValueError, RecursionError) as error:
        reading.problems.append(Problem(name, f"its caption is not UTF-8 or no JSON ({error})"))
        return
    yield Example(name, source, captions, split=_split_of_file(path, reading))


# --- parquet --------------------------------------------------------------------------------------


def _parquet(path: Path, reading: _Reading) -> Iterator[Example]:
    table = _parquet_file(path)
    names = table.schema_arrow.names
    columns = (reading.image_column,) if reading.image_column else ("image", *_FILE_COLUMNS)
    found = [column for column in columns if column in names]
    if not found:
        raise BadInput(
            f"{path}: has the columns {', '.join(names)[:200]}, none with pictures: name it with "
            "image_column"
        )
    column = found[0]
    is_text = str(table.schema_arrow.field(column).type) in ("string", "large_string")
    wanted = [name for name in names if name != column or is_text]
    for number, row in enumerate(table.read(columns=wanted).to_pylist()):
        texts = reading.texts(row)
        reading.check_columns(path, row, texts)
        captions = tuple(text for text in texts or () if text)
        split = _split(row, path) or _split_of_file(path, reading)
        if is_text:
            name = str(row[column])
            if _is_inside(name):
                source: Source = Stretch(path.parent / name)
                yield Example(_clean(name), source, captions, split=split)
            else:
                reading.problems.append(Problem(name[:100], "leads out of the folder of the data"))
        else:
            source = Cell(path, number, column)
            yield Example(f"{path.name}:{number}", source, captions, split=split)


def _parquet_file(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra("train", f"reading {path.name}") from error
    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise BadInput(f"{path}: is no parquet table, or a damaged one ({error})") from error


@lru_cache(maxsize=2)
def _column(path: Path, column: str) -> Any:
    return _parquet_file(path).read(columns=[column])[column]
