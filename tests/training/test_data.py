"""The conventions people keep captioned pictures in, and what is checked before training."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.errors import BadImage, BadInput
from diptych.training.data import Dataset, prepare, write_captions
from diptych.training.formats import read_examples
from training_pictures import draw_pictures


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    rng = np.random.default_rng(seed)
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {each.name: each.captions for each in (*dataset.train, *dataset.validation)}


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_imagefolder_json_lines(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "deep/b.png", "text": ["a dog", "a small dog"]},
        {"file_name": "a.png", "text": "once more a cat"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    write(tmp_path, {"metadata.jsonl": lines, "a.png": png(1), "deep/b.png": png(2)})
    assert captions(prepare(tmp_path)) == {
        "a.png": ("a cat", "once more a cat"),
        "deep/b.png": ("a dog", "a small dog"),
    }


def test_imagefolder_csv_with_own_columns(tmp_path: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["picture", "words"], ["a.png", 'a "big", red cat'], ["b.png", "b"]])
    write(tmp_path, {"metadata.csv": table.getvalue(), "a.png": png(1), "b.png": png(2)})
    found = prepare(tmp_path, image_column="picture", caption_column="words")
    assert captions(found) == {"a.png": ('a "big", red cat',), "b.png": ("b",)}


def test_folders_of_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        row = json.dumps({"file_name": "x.png", "text": split})
        write(tmp_path / split, {"metadata.jsonl": row, "x.png": png(number)})
    found = prepare(tmp_path)
    assert [each.captions for each in found.train] == [("train",)]
    assert [each.captions for each in found.validation] == [("validation",)]
    assert found.report.left_out == 1


def test_split_column(tmp_path: Path) -> None:
    rows = [
        {"file": f"{n}.png", "captions": [f"{n}"], "split": split}
        for n, split in enumerate(["train", "val", "train", "test"])
    ]
    files: dict[str, str | bytes] = {f"{n}.png": png(n) for n in range(4)}
    write(tmp_path, {"captions.jsonl": "\n".join(map(json.dumps, rows)), **files})
    for data in (tmp_path, tmp_path / "captions.jsonl"):
        found = prepare(data)
        assert [each.captions[0] for each in found.train] == ["0", "2"]
        assert [each.captions[0] for each in found.validation] == ["1"]


def test_text_files_beside_pictures(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "a.png": png(1),
        "a.txt": "a cat\n\n a black cat \n",
        "sub/b.jpg": png(2),
        "sub/b.caption": "\ufeffa dog".encode(),
        "c.png": png(3),
        "c.png.txt": "a bird",
        "d.png": png(4),
        "d.txt": "Grüße".encode("utf-16"),
        ".hidden/e.png": png(5),
    }
    assert captions(prepare(write(tmp_path, files))) == {
        "a.png": ("a cat", "a black cat"),
        "sub/b.jpg": ("a dog",),
        "c.png": ("a bird",),
        "d.png": ("Grüße",),
    }


def test_kohya_folders(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "10_sks dog/a.png": png(1),
        "10_sks dog/b.png": png(2),
        "10_sks dog/b.txt": "a dog in the snow",
        "2_cat/c.png": png(3),
        "notes.txt": "not a caption",
    }
    found = prepare(write(tmp_path, files))
    assert captions(found) == {
        "10_sks dog/a.png": ("sks dog",),
        "10_sks dog/b.png": ("a dog in the snow",),
        "2_cat/c.png": ("cat",),
    }
    assert [each.repeats for each in found.train] == [10, 10, 2]


def test_webdataset_shards(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar",
        {
            "x/a.png": png(1),
            "x/a.txt": b"a cat",
            "x/b.jpg": png(2),
            "x/b.json": json.dumps({"caption": "a dog"}).encode(),
        },
    )
    tar(tmp_path / "1.tar", {"a.seg.txt": b"", "a.png": png(3), "a.txt": b"a bird"})
    found = captions(prepare(tmp_path))
    assert found == {"0.tar:x/a": ("a cat",), "0.tar:x/b": ("a dog",), "1.tar:a": ("a bird",)}
    assert len(captions(prepare(tmp_path / "0.tar"))) == 2


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    inside = pa.table(
        {
            "image": [{"bytes": png(1), "path": "a.png"}, {"bytes": png(2), "path": None}],
            "text": ["a cat", "a dog"],
        }
    )
    parquet.write_table(inside, tmp_path / "part.parquet")
    found = prepare(tmp_path)
    assert captions(found) == {"part.parquet:0": ("a cat",), "part.parquet:1": ("a dog",)}
    assert np.asarray(found.train[0].open()).shape == (16, 16, 3)
    named = tmp_path / "named"
    write(named, {"a.png": png(3)})
    parquet.write_table(
        pa.table({"file_name": ["a.png"], "captions": [["one", "two"]]}), named / "metadata.parquet"
    )
    assert captions(prepare(named)) == {"a.png": ("one", "two")}


def test_what_is_wrong_is_told_and_the_rest_is_used(tmp_path: Path) -> None:
    rows = [
        {"file_name": "good.png", "text": "good"},
        {"file_name": "same.png", "text": "the same"},
        {"file_name": "cut.png", "text": "cut"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "empty.png", "text": "  "},
        {"file_name": "../outside.png", "text": "outside"},
        {"text": "nothing"},
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken"]
    files: dict[str, str | bytes] = {
        "metadata.jsonl": "\n".join(lines),
        "good.png": png(1),
        "same.png": png(1),
        "cut.png": png(2)[:200],
        "empty.png": png(3),
    }
    report = prepare(write(tmp_path / "data", files)).report
    assert {each.name: each.reason.split(":")[0] for each in report.problems}.keys() == {
        "cut.png",
        "gone.png",
        "../outside.png",
        "metadata.jsonl, line 7",
        "metadata.jsonl, line 8",
    }
    assert report.duplicates == (("same.png", "good.png"),)
    assert report.without_caption == ("empty.png",)
    assert report.train == 1
    text = report.as_text()
    for part in ("gone.png: cannot be read", "same.png = good.png", "1 have no caption", "256 px"):
        assert part in text
    assert json.loads(json.dumps(report.as_dict()))["duplicates"] == [["same.png", "good.png"]]


def test_captions_of_equal_pictures_are_joined(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "a.png": png(1), "a.txt": "one", "b.png": png(1), "b.txt": "two"
    }  # fmt: skip
    assert captions(prepare(write(tmp_path, files))) == {"a.png": ("one", "two")}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no pictures"),
        ({"a.png": png(1)}, "caption_with"),
        ({"a.png": b"no picture", "a.txt": "x"}, r"none of its pictures can be used.*a\.png"),
        ({"a.png": png(1), "a.txt": b"\xff\xfeb"}, "UTF"),
        ({"a.png": png(1), "a.txt": b"caf\xe9"}, r"a\.txt: is not UTF-8 \(byte 3\)"),
        ({"x.tar": b"no tar at all, not at all" * 99}, "no uncompressed tar"),
        ({"x.parquet": b"no parquet"}, "no parquet table"),
    ],
)
def test_data_of_no_use_is_refused(
    tmp_path: Path, files: dict[str, str | bytes], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        prepare(write(tmp_path, files))


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        read_examples(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"ends in \.jsonl"):
        read_examples(write(tmp_path, {"x.zip": b""}) / "x.zip")


def test_what_is_held_out_follows_from_content_alone(tmp_path: Path) -> None:
    big = draw_pictures(tmp_path / "big", 60, seed=1)
    found = prepare(big, validation_fraction=0.3)
    held = {each.digest for each in found.validation}
    assert 8 <= len(held) <= 28
    # The same pictures under other names, and half of them gone.
    other = tmp_path / "other"
    files: dict[str, str | bytes] = {}
    for number in range(0, 60, 2):
        files[f"z{99 - number}.png"] = (big / f"{number:03}.png").read_bytes()
        files[f"z{99 - number}.txt"] = "x"
    again = prepare(write(other, files), validation_fraction=0.3)
    kept = {each.digest for each in (*again.train, *again.validation)}
    assert {each.digest for each in again.validation} == held & kept


def test_few_pictures_are_all_trained_on(tmp_path: Path) -> None:
    data = draw_pictures(tmp_path, 9, seed=1)
    assert len(prepare(data).validation) == 0
    assert len(prepare(data, validation_fraction=0.01).validation) == 1


def test_a_changed_picture_is_noticed(tmp_path: Path) -> None:
    data = draw_pictures(tmp_path, 3, seed=1)
    item = prepare(data).train[0]
    (data / item.name).write_bytes(png(77))
    with pytest.raises(BadImage, match="has changed since the run began"):
        item.open()
    (data / item.name).unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        item.open()


def test_captions_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw_pictures(tmp_path / "data", 3, seed=1)
    (data / "metadata.jsonl").unlink()
    path = tmp_path / "run" / "captions.jsonl"
    found = prepare(data, caption_all=write_captions(path, "default"))
    assert all(len(each.captions) == 1 and each.captions[0] for each in found.train)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = "my own words"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"sha256": "cut off')

    def refuse(*_: Any) -> None:
        raise AssertionError("everything is captioned already")

    monkeypatch.setattr("diptych.image_to_text.captioner.Captioner.load", refuse)
    again = prepare(data, caption_all=write_captions(path, "default"))
    assert again.train[0].captions == ("my own words",)
    assert again.train[1].captions == found.train[1].captions


@pytest.mark.parametrize(
    "name", ["train-00000-of-00001", "test-00000-of-00001", "validation", "dev_1"]
)
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_tell_their_split_by_their_names(tmp_path: Path, name: str, kind: str) -> None:
    split = {"tr": "train", "te": "test"}.get(name[:2], "validation")
    if kind == "tar":
        tar(tmp_path / f"{name}.tar", {"a.png": png(1), "a.txt": b"a cat"})
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"image": [{"bytes": png(1), "path": "a"}], "text": ["a cat"]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / f"{name}.parquet")
    (example,), _ = read_examples(tmp_path)
    assert example.split == split
    (example,), _ = read_examples(next(tmp_path.glob(f"{name}*")))
    assert example.split == ""  # who names one file wants it


def test_names_that_only_begin_like_a_split(tmp_path: Path) -> None:
    tar(tmp_path / "testament.tar", {"a.png": png(1), "a.txt": b"a cat"})
    assert [each.split for each in read_examples(tmp_path)[0]] == [""]


def test_a_year_is_no_count_of_repeats(tmp_path: Path) -> None:
    write(tmp_path, {"2024_holiday/x.png": png(1), "cats/y.png": png(2), "cats/y.txt": "a cat"})
    found, problems = read_examples(tmp_path)
    assert {each.name: (each.captions, each.repeats) for each in found} == {
        "2024_holiday/x.png": ((), 1),
        "cats/y.png": (("a cat",), 1),
    }
    assert not problems


def test_what_lies_beside_kohyas_folders_is_told_of(tmp_path: Path) -> None:
    write(tmp_path, {"10_dog/x.png": png(1), "cats/y.png": png(2), "z.png": png(3)})
    write(tmp_path, {"0_fish/f.png": png(4), "log/events.txt": "x"})
    found, problems = read_examples(tmp_path)
    assert [(each.name, each.repeats) for each in found] == [("10_dog/x.png", 10)]
    assert {each.name: each.reason.split(":")[0] for each in problems} == {
        "0_fish": "counts 0 times, and is left out",
        "cats": "is left out beside folders such as 0_fish",
        "z.png": "is left out beside folders such as 0_fish",
    }


def test_nothing_that_counts(tmp_path: Path) -> None:
    write(tmp_path, {"0_dog/x.png": png(1)})
    with pytest.raises(BadInput, match="counts 0 times"):
        prepare(tmp_path)


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x1e"])
def test_rows_end_at_line_feeds_alone(tmp_path: Path, mark: str) -> None:
    text = f"a cafe{mark}at night"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    write(tmp_path / "one", {"metadata.jsonl": f"{row}\r\n", "a.png": png(1)})
    write(
        tmp_path / "two", {"metadata.csv": f"file_name,text\r\na.png,{text}\r\n", "a.png": png(1)}
    )
    for folder in ("one", "two"):
        assert captions(prepare(tmp_path / folder)) == {"a.png": (text,)}


def test_a_table_in_capitals(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "a.png", "text": "a cat"})
    write(tmp_path, {"DATA.JSONL": row, "a.png": png(1)})
    assert captions(prepare(tmp_path / "DATA.JSONL")) == {"a.png": ("a cat",)}


def test_names_and_captions_that_no_file_can_hold(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "a cat \ud83d"},  # cut within a letter by JavaScript
        {"file_name": "b\u0000.png", "text": "a dog"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    write(tmp_path / "table", {"metadata.jsonl": lines, "a.png": png(1)})
    found = prepare(tmp_path / "table")
    assert captions(found) == {"a.png": ("a cat",)}
    assert "null byte" in found.report.problems[0].reason
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / "caf\udce9.png").write_bytes(png(2))  # Latin-1, legal on Linux
    (folder / "caf\udce9.txt").write_text("a cafe")
    found = prepare(folder)
    assert captions(found) == {"caf.png": ("a cafe",)}
    json.dumps(found.report.as_dict(), ensure_ascii=False).encode()
    assert found.train[0].open().size == (16, 16)


def test_dots_in_the_names_of_a_shard(tmp_path: Path) -> None:
    members = {"IMG.1.png": png(1), "IMG.1.txt": b"one", "IMG.2.png": png(2), "IMG.2.txt": b"two"}
    members |= {"x.png": png(3), "x.seg.png": png(4), "x.txt": b"three"}  # a mask beside it
    found, _ = read_examples(tar(tmp_path / "a.tar", members))
    assert {each.name: each.captions for each in found} == {
        "a.tar:IMG.1": ("one",),
        "a.tar:IMG.2": ("two",),
        "a.tar:x": ("three",),
    }


def test_json_without_end_in_a_shard(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    members = {"a.png": png(1), "a.json": deep, "b.png": png(2), "b.txt": b"b"}
    found, problems = read_examples(tar(tmp_path / "a.tar", members))
    assert [each.name for each in found] == ["a.tar:b"] and problems[0].name == "a.tar:a"


def test_a_folder_that_only_begins_like_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"~nobody_of_this_name/a.png": png(1), "~nobody_of_this_name/a.txt": "a"})
    assert captions(prepare("~nobody_of_this_name")) == {"a.png": ("a",)}


def test_captions_cut_within_a_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.image_to_text.captioner import Captioner

    class Fake:
        def captions(self, images: Any) -> Any:
            from types import SimpleNamespace

            return [SimpleNamespace(text="written") for _ in images]

    monkeypatch.setattr(Captioner, "load", lambda _: Fake())
    write(tmp_path / "data", {"a.png": png(1), "b.png": png(2)})
    path = tmp_path / "captions.jsonl"
    found = prepare(tmp_path / "data", caption_all=write_captions(path, "default"))
    assert set(captions(found).values()) == {("written",)}
    lines = path.read_bytes().splitlines(keepends=True)
    row = {**json.loads(lines[0]), "text": "é"}
    first = json.dumps(row, ensure_ascii=False).encode()
    path.write_bytes(first + b"\n" + '{"text": "é'.encode()[:-1])
    found = prepare(tmp_path / "data", caption_all=write_captions(path, "default"))
    assert sorted(captions(found).values()) == [("written",), ("é",)]
    assert json.loads(path.read_bytes().splitlines()[-1])["text"] == "written"


def test_folders_of_splits_count_beside_text_files(tmp_path: Path) -> None:
    files: dict[str, Any] = {}
    for number, split in enumerate(("train", "train", "validation", "test")):
        files[f"{split}/{number}.png"] = png(number)
        files[f"{split}/{number}.txt"] = f"number {number}"
    write(tmp_path, files)
    found, _ = read_examples(tmp_path)
    assert [each.split for each in found] == ["test", "train", "train", "validation"]


def test_pictures_that_no_table_names_are_told(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "a.png", "text": "one"})
    write(tmp_path, {"metadata.jsonl": row, "a.png": png(1), "sub/b.png": png(2), "c.png": png(3)})
    found, (problem,) = read_examples(tmp_path)
    assert [each.name for each in found] == ["a.png"]
    assert problem.name == "c.png" and "is named by no table, nor 1 more" in problem.reason


def test_a_column_of_captions_that_is_not_there_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.csv": "file_name,text\na.png,one\n", "a.png": png(1)})
    with pytest.raises(BadInput, match="has the columns file_name, text, none is 'txet'"):
        read_examples(tmp_path, caption_column="txet")


def test_names_written_on_windows(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "sub\\a.png", "text": "one"})
    write(tmp_path, {"metadata.jsonl": row, "sub/a.png": png(1)})
    found = prepare(tmp_path)
    assert list(captions(found).values()) == [("one",)] and not found.report.problems


def test_shards_in_folders_of_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val")):
        (tmp_path / split).mkdir()
        members = {f"{number}.png": png(number), f"{number}.txt": b"words"}
        tar(tmp_path / split / "0000.tar", members)
    found, _ = read_examples(tmp_path)
    assert [(each.name, each.split) for each in found] == [
        ("0000.tar:0", "train"),
        ("0000.tar:1", "validation"),
    ]
