"""The verbs about models: `export` and `models`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from diptych.cli.flags import Output, Revision
from diptych.cli.terminal import Format, complain

__all__ = ["export", "models"]


def export(
    model: Annotated[str, typer.Argument(help="Name, folder or hub id of a model.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the ONNX files.")],
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="int8, for a quarter of the size; a generator also takes fp16."),
    ] = None,
    task: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="image-to-text or text-to-image, where the name alone does not say it."),
    ] = None,
    images: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Pictures on which to compare captions; files, folders or globs."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a model as ONNX files that run without torch, and compare what both make."""
    from diptych.inputs import find_pictures
    from diptych.runtimes.conversion import export as export_any

    sources = [each.source for each in find_pictures(images)] if images else None
    found = export_any(
        model, folder, task=task, quantize=quantize, images=sources, revision=revision
    )
    print(json.dumps(found, indent=2))
    complain(f"written to {folder}")


def models(format: Output = Format.text) -> None:
    """List the models that are embedded, cached and known."""
    from diptych.weights.catalog import available_models

    known = available_models()
    if format is not Format.text:
        records = [{**dataclasses.asdict(each)} for each in known]
        lines = [json.dumps(record, default=str, ensure_ascii=False) for record in records]
        print("\n".join(lines) if format is Format.jsonl else f"[{','.join(lines)}]")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "task", "where", "size", "licence", "source", box=None, pad_edge=False)
    for each in known:
        size = f"{each.size / 1e6:.0f} MB" if each.size else "?"
        table.add_row(each.name, each.task, each.state, size, each.licence, each.source)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # names are for copying: never cut one
    console.print(table)
