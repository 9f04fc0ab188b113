"""The verbs of `evaluate`: measure a model on data with answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.cli.evaluate_images import evaluate_images
from diptych.cli.evaluate_style import evaluate_style
from diptych.cli.flags import BatchSize, Loading, Output, with_options
from diptych.cli.terminal import SOME_FAILED, Format, check_writable, complain, progress
from diptych.cli.verbs import without_frills
from diptych.errors import BadInput

if TYPE_CHECKING:
    from diptych.evaluation.captions import CaptionReport
    from diptych.image_to_text.captioner import Captioner

__all__ = ["app"]

app = without_frills(no_args_is_help=True, help="Measure a model on data with answers.")


@app.command("captions")
@with_options("CaptionOptions", shared=("loading", Loading))
def evaluate_captions(
    references: Annotated[
        Path, typer.Argument(help="JSON lines with 'file' and 'captions', and maybe 'split'.")
    ],
    *,
    options: Any,
    loading: Loading,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the pictures; else that of the references."),
    ] = None,
    split: Annotated[str, typer.Option(help="Use only the rows of this split.")] = "",
    captions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Judge these captions (JSON lines) instead of running a model."),
    ] = None,
    save_captions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the captions there, as JSON lines."),
    ] = None,
    format: Output = Format.text,
    batch_size: BatchSize = 8,
) -> None:
    """Score captions against people's: BLEU, ROUGE-L and CIDEr-D, beside blind baselines."""
    from diptych.evaluation.captions import read_captions, read_references, report

    if save_captions is not None:
        check_writable(save_captions)
    described = read_references(references, images, split)
    failed = 0
    if captions is not None:
        texts = read_captions(captions, described)
    else:
        from diptych.image_to_text.captioner import Captioner

        captioner = loading.load(Captioner.load)
        paths = [each.path for each in described]
        texts, failed = caption_texts(captioner, paths, options, batch_size)
    if save_captions is not None:
        rows = zip(described, texts, strict=True)
        lines = [json.dumps({"file": str(d.path), "text": text}) + "\n" for d, text in rows]
        try:
            save_captions.write_text("".join(lines), encoding="utf-8")
        except OSError as error:  # the scores are told all the same
            complain(f"{save_captions}: cannot be written ({error.strerror or error})")
            failed += 1
    found = report(texts, [each.captions for each in described])
    if format is not Format.text:
        print(json.dumps(found.as_dict(), indent=2 if format is Format.json else None))
    else:
        print_report(found)
    if failed:
        raise typer.Exit(SOME_FAILED)


app.command("images")(evaluate_images)
app.command("style")(evaluate_style)


def print_report(found: CaptionReport) -> None:
    """Print the scores as a table, blind baselines below them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "length_ratio")
    table = Table("", *names, box=None, pad_edge=False)
    rows_of_scores = {
        "captions": found.scores,
        "blind: dealt to wrong pictures": found.blind,
        f"constant: {escape(found.constant_caption)}": found.constant,
    }
    for title, scores in rows_of_scores.items():
        if scores is not None:
            table.add_row(title, *(f"{getattr(scores, name):.4f}" for name in names))
    Console(width=160).print(table)
    low, high = found.cider_d_interval
    print(
        f"{found.scores.num_images} pictures, {found.num_different} different captions; "
        f"CIDEr-D {found.scores.cider_d:.4f}, 95 % interval {low:.4f} to {high:.4f}"
    )


def caption_texts(
    captioner: Captioner, paths: list[Path], options: Any, batch_size: int
) -> tuple[list[str], int]:
    """Return every picture's caption, empty where it cannot be read, and how many could not.

    Raises `BadInput` where none can be read.
    """
    texts, failed = [], 0
    with progress("captioning", len(paths)) as advance:
        for path, result in zip(
            paths, captioner.captions(paths, options, batch_size=batch_size), strict=True
        ):
            if result.error is not None:
                failed += 1
                complain(f"{path}: {result.error.reason}")
            texts.append(result.text)
            advance()
    if failed == len(paths):
        raise BadInput("not one of the pictures can be read: give their folder with --images")
    return texts, failed
