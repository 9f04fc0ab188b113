"""What the report shows is whole: no number at the side of a chart is cut off."""

from __future__ import annotations

import json
import re
from pathlib import Path

from diptych.training.journal import read_rows
from diptych.training.report import write_report

_WIDEST = 0.65  # of the font's size, a digit of common fonts


def test_numbers_beside_the_charts_have_room(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 1e5 / step, "learning_rate": 1e-4 / step, "images_per_s": 0.004}
        for step in range(1, 4)
    ]
    write_report(tmp_path, rows, {})
    page = (tmp_path / "report.html").read_text()
    labels = re.findall(
        r'<text x="(\d+)" y="[\d.]+" font-size="(\d+)" text-anchor="end">([^<]+)</text>', page
    )
    beside = [(float(x), float(size), text) for x, size, text in labels if float(x) < 100]
    assert len(beside) == 9
    for x, size, text in beside:
        assert len(text) * size * _WIDEST <= x, text


def test_rows_cut_within_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"step": 1, "sample": "a café\u2028at night"}, ensure_ascii=False)
    path.write_bytes(f'{whole}\n{{"step": 2, "sample": "é'.encode()[:-1])
    assert [row["step"] for row in read_rows(path)] == [1]
