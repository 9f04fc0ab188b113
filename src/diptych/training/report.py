"""Draw what a run measured on one page that needs nothing beside it: `report.html`."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.training.checkpoints import write_whole

__all__ = ["write_report"]

_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 220, 66, 24
_COLOURS = ("#3056d3", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
_MOST_POINTS = 600
_SAMPLE = re.compile(r"step-(\d+)-(\d+)\.\w+")

Line = tuple[str, Sequence[tuple[float, float]]]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;
color:#1c1917;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1.5rem}
figure{margin:0}figcaption span{white-space:nowrap}svg{width:100%;height:auto}
figcaption{font-size:.85rem;color:#57534e}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.15rem .6rem;text-align:left;
vertical-align:top}
.samples td{text-align:center}.samples img{display:block;width:128px;height:auto}
.warning{background:#fef3c7;padding:.5rem .8rem;border-radius:.3rem}
details{margin-top:2rem}
"""


def write_report(
    folder: Path, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> None:
    """Write `report.html` in `folder` from the rows of `metrics.jsonl` and the samples there."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    checked = [(row["step"], row["validation"]) for row in rows if "validation" in row]
    parts = [name for name in (checked[0][1] if checked else {}) if name not in ("loss", "change")]
    training: list[Line] = [("training", losses), ("smoothed", _smoothed(losses))]
    held_out: list[Line] = [("held out", [(step, found["loss"]) for step, found in checked])]
    by_part: list[Line] = [
        (name, [(step, found[name]) for step, found in checked if name in found]) for name in parts
    ]
    charts = [
        _chart("Training loss", training),
        _chart("Validation loss, same noise every time", held_out),
        _chart("Validation by part, against the start", [_relative(each) for each in by_part]),
        _chart("Learning rate", [("rate", _column(rows, "learning_rate"))]),
        _chart("Pictures a second", [("speed", _column(rows, "images_per_s"))]),
    ]
    body = [
        "<h1>Training report</h1>",
        _summary(rows, checked),
        *(f'<p class="warning">{html.escape(row["warning"])}</p>' for row in _last_warning(rows)),
        '<div class="charts">',
        *charts,
        "</div>",
        _samples(folder / "samples"),
        _captions(rows),
        _table("Options", options),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>Training report</title><style>{_STYLE}</style>{''.join(body)}</html>\n"
    )
    write_whole(folder / "report.html", page)


def _last_warning(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if "warning" in row][-1:]


def _summary(
    rows: Sequence[Mapping[str, Any]], checked: Sequence[tuple[int, Mapping[str, float]]]
) -> str:
    if not rows:
        return "<p>Nothing measured yet.</p>"
    text = f"Step {rows[-1]['step']}."
    if checked:
        first, last = checked[0][1]["loss"], checked[-1][1]["loss"]
        text += f" Validation loss {first:.4f} at the start, {last:.4f} now"
        text += f" ({100 * (last / first - 1):+.1f} %)." if first else "."
    return f"<p>{text}</p>"


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) < 8:
        return []
    mean, found = points[0][1], []
    for x, y in points:
        mean += 0.1 * (y - mean)
        found.append((x, mean))
    return found


def _relative(line: Line) -> Line:
    name, points = line
    first = points[0][1] if points and points[0][1] else 1.0
    return name, [(x, y / first) for x, y in points]


# --- charts ---------------------------------------------------------------------------------------


def _chart(title: str, lines: Sequence[Line]) -> str:
    """Return a line chart as SVG, or nothing where there are no numbers."""
    drawn = [(name, _thinned(points)) for name, points in lines]
    drawn = [(name, points) for name, points in drawn if points]
    everything = [point for _, points in drawn for point in points]
    if not everything:
        return ""
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    low, high = min(ys), max(ys)
    if high <= low:
        low, high = low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - 8)
        down = 8 + (high - y) / (high - low) * (_HEIGHT - _BELOW - 8)
        return f"{across:.1f},{down:.1f}"

    marks = [_tick(low + (high - low) * share, share) for share in (0, 0.5, 1)]
    base = f'y="{_HEIGHT - 6}" font-size="13"'
    marks.append(f'<text x="{_LEFT}" {base}>step {left:g}</text>')
    marks.append(f'<text x="{_WIDTH - 8}" {base} text-anchor="end">{right:g}</text>')
    curves, legend = [], []
    for index, (name, points) in enumerate(drawn):
        colour = _COLOURS[index % len(_COLOURS)]
        faint = ' opacity="0.35"' if name == "training" and len(drawn) > 1 else ""
        path = " ".join(place(x, y) for x, y in points)
        curves.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{faint} points="{path}"/>'
        )
        if len(points) <= 30:
            dots = [place(x, y).split(",") for x, y in points]
            curves += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in dots]
        legend.append(f'<span><b style="color:{colour}">■</b> {html.escape(name)}</span>')
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{html.escape(title)}">{"".join(marks + curves)}</svg>'
        f"<figcaption>{html.escape(title)}: {' '.join(legend)}</figcaption></figure>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    every = max(1, len(finite) // _MOST_POINTS)
    return finite[::every] + (finite[-1:] if every > 1 else [])


def _tick(value: float, share: float) -> str:
    down = 8 + (1 - share) * (_HEIGHT - _BELOW - 8)
    written = f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.1e}"
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{down:.1f}" y2="{down:.1f}" stroke="#e7e5e4"/>'
        f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" font-size="13" text-anchor="end">{written}'
        "</text>"
    )


# --- samples and tables ---------------------------------------------------------------------------


def _samples(folder: Path) -> str:
    """Return the sample pictures as a table: a row a step, a column a prompt."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("step-*")) if folder.is_dir() else []:
        if match := _SAMPLE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    if not found:
        return ""
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    head = "".join(f"<th>{html.escape(prompt[:80])}</th>" for prompt in prompts)
    body = ""
    for step, pictures in sorted(found.items()):
        cells = "".join(f"<td>{_picture(pictures[n])}</td>" for n in sorted(pictures))
        body += f"<tr><th>step {step}</th>{cells}</tr>"
    return f"<h2>Samples</h2><table class=samples><tr><th></th>{head}</tr>{body}</table>"


def _picture(path: Path) -> str:
    import io

    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((256, 256))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=85)
    coded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/webp;base64,{coded}">'


def _captions(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the captioner said of held-out pictures, the last time it was asked."""
    shown = [row for row in rows if row.get("captions")]
    if not shown:
        return ""
    body = "".join(
        f"<tr><td>{html.escape(each['file'])}</td><td>{html.escape(each['caption'])}</td>"
        f"<td>{html.escape(each['reference'])}</td></tr>"
        for each in shown[-1]["captions"]
    )
    step = shown[-1]["step"]
    return (
        f"<h2>Captions at step {step}</h2><table><tr><th>picture</th><th>caption</th>"
        f"<th>a person's</th></tr>{body}</table>"
    )


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"
