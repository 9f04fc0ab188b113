"""Files of captions, and what their scores are told beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.errors import BadInput
from diptych.evaluation.captions import Described, read_captions, read_references, report


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x1e"])
def test_rows_end_at_line_feeds_alone(tmp_path: Path, mark: str) -> None:
    row = {"file": "a.png", "captions": [f"a dog{mark}on grass"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", "utf-8")
    (found,) = read_references(tmp_path / "x.jsonl")
    assert found.captions == (f"a dog{mark}on grass",)


@pytest.mark.parametrize("line", ['{"file": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_python_refuses(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(BadInput, match="line 1: is not"):
        read_references(tmp_path / "x.jsonl")


def test_two_captions_for_one_picture(tmp_path: Path) -> None:
    rows = [{"file": "a.png", "text": text} for text in ("one", "two")]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(BadInput, match=r"line 2: has a second caption for a\.png"):
        read_captions(tmp_path / "x.jsonl", [Described(Path("a.png"), ("a",))])


def test_one_picture_has_no_other_to_be_dealt_to() -> None:
    found = report(["a dog"], [["a dog on grass"]])
    assert found.blind is None and found.as_dict()["blind"] is None


def test_what_a_captioner_wrote_is_no_reference(tmp_path: Path) -> None:
    row = {"file": "a.png", "text": "a dog", "token_ids": [1], "token_logprobs": [-1.0]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadInput, match=r"with --captions x\.jsonl"):
        read_references(tmp_path / "x.jsonl")
