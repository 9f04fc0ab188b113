"""The verb `evaluate style`: how far results are from the content and how near to the style."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.cli.edit import NOT_OF_STYLE
from diptych.cli.flags import Loading, Output, with_options
from diptych.cli.terminal import SOME_FAILED, Format, complain, progress
from diptych.errors import BadInput, DiptychError

if TYPE_CHECKING:
    from PIL import Image

    from diptych.evaluation.style_metrics import StyleReport

__all__ = ["evaluate_style"]


@with_options("StyleOptions", without=NOT_OF_STYLE, shared=("loading", Loading))
def evaluate_style(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with 'content', 'style' and, unless a model makes it, 'result'."
        ),
    ],
    *,
    options: Any,
    loading: Loading,
    alexnet: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Weights of torchvision's AlexNet to measure with: a file, or owner/name/file of "
            "the hub; else statistics."
        ),
    ] = None,
    format: Output = Format.text,
) -> None:
    """Measure style transfers: distance from the content's structure, and from the style."""
    from diptych.evaluation.style_metrics import report

    rows = list(read_pairs(pairs))
    measure = None
    if alexnet is not None:
        from diptych.evaluation.perceptual import Perceptual
        from diptych.runtimes.network import require_torch

        require_torch("measuring with AlexNet")
        measure = Perceptual(alexnet)
    generator = None
    if any(row.get("result") is None for row in rows):
        from diptych.text_to_image.generator import ImageGenerator

        generator = loading.load(ImageGenerator.load)
    triples, failed = [], 0
    with progress("stylizing", len(rows)) as advance:
        for row in rows:
            try:
                triples.append(_triple(row, generator, options))
            except DiptychError as error:
                failed += 1
                complain(f"{row['content']}: {error}")
            advance()
    if not triples:
        raise DiptychError("not one of the pictures could be measured")
    if measure is None:
        found = report(triples)
    else:
        found = report(
            triples, measure.structure_distance, measure.style_distance, measure.measures
        )
    if format is not Format.text:
        print(json.dumps(found.as_dict(), indent=2 if format is Format.json else None))
    else:
        _print(found)
    if failed:
        raise typer.Exit(SOME_FAILED)


def read_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines, paths made relative to it; `BadInput` for others."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise BadInput(f"{path}: cannot be read ({reason})") from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            given = {name: row.get(name) for name in ("content", "style", "result")}
            fits = all(isinstance(given[name], str) for name in ("content", "style"))
            fits = fits and isinstance(given["result"], str | None)
        except (ValueError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise BadInput(f"{path}, line {number}: give an object with 'content' and 'style'")
        count += 1
        yield {name: each and str(path.parent / each) for name, each in given.items()}
    if not count:
        raise BadInput(f"{path}: there is no pair of pictures in it")


def _triple(
    row: dict[str, Any], generator: Any, options: Any
) -> tuple[Image.Image, Image.Image, Image.Image]:
    from diptych.images import open_image

    content, style = open_image(row["content"]), open_image(row["style"])
    if row["result"] is not None:
        return content, style, open_image(row["result"])
    return content, style, generator.style_transfer(content, style, options).image


def _print(found: StyleReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "structure", "style", "(1+a)(1+b)", "pictures", box=None, pad_edge=False)
    scores = found.as_dict()["scores"]
    for name, parts in scores.items():
        cells = [f"{parts[part]['mean']:.3f}" for part in ("structure", "style", "joined")]
        table.add_row(name, *cells, str(len(found.results)))
    console = Console(width=120)
    console.print(table)
    console.print(f"distances, less is better; {found.measures}", highlight=False)
