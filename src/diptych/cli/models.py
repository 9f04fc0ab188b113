"""The verbs about models: `export` and `models`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from diptych.cli.flags import Output, Revision, Task
from diptych.cli.terminal import Format, complain
from diptych.errors import BadInput

__all__ = ["export", "models"]

_COMPARED = 32  # pictures of the references whose tokens are compared, too


def export(
    model: Annotated[str, typer.Argument(help="Name, folder or hub id of a model.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the ONNX files: a new folder.")],
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="fp16, int8 or int4: half, a quarter or an eighth of the bytes."),
    ] = None,
    profile: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="edge: a captioner under 100 MB, int4 with the words captions use."),
    ] = None,
    task: Task = None,
    images: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Pictures on which to compare captions; files, folders or globs."),
    ] = None,
    calibration: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="What fixes the ranges of int8: pictures for a captioner's encoder, text files of "
            "prompts, one a line, for a generator's UNet."
        ),
    ] = None,
    references: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="JSON lines of pictures with captions, as for `evaluate captions`: CIDEr-D before "
            "and after, and a bound on its loss."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Only rows of this split of --references.")] = "",
    scenes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            help="Prompts of `evaluate images` that a generator draws before and after: PSNR, SSIM "
            "and adherence; 20 for the default generator, else none.",
        ),
    ] = None,
    words: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Text whose words the edge profile keeps, in place of its own."),
    ] = None,
    revision: Revision = None,
    measure: Annotated[
        bool, typer.Option(help="Measure size, memory and speed before and after.")
    ] = True,
    force: Annotated[
        bool,
        typer.Option("--force", help="Keep an export under its bound; replace files in a folder."),
    ] = False,
) -> None:
    """Write a model as ONNX files that run without torch, and compare what both make."""
    from diptych.evaluation.exported import picture_judge
    from diptych.inputs import find_pictures
    from diptych.runtimes.conversion import export as export_any
    from diptych.runtimes.conversion import tasks_of

    judge = None
    sources = [each.source for each in find_pictures(images)] if images else None
    ranging = _calibrating(calibration) if calibration else None
    if references is not None:
        from diptych.evaluation.captions import read_references
        from diptych.evaluation.exported import caption_judge

        described = read_references(references, split=split)
        judge = caption_judge(described, force=force)
        sources = sources or [each.path for each in described[:_COMPARED]]
    found = export_any(
        model,
        folder,
        task=task,
        quantize=quantize,
        profile=profile,
        images=sources,
        calibration=ranging,
        words=None if words is None else _words_in(words),
        revision=revision,
        force=force,
        measure=measure,
        judge=judge,
        picture_judge=picture_judge(scenes),
    )
    print(json.dumps(found, indent=2))
    (kind,) = tasks_of(folder)
    use = "caption" if kind == "image-to-text" else "generate"
    complain(f"written to {folder}: try `diptych {use} … --model {folder}`")


def _calibrating(given: list[str]) -> list[Any]:
    """Return the prompts of text files, or else pictures."""
    from diptych.inputs import find_pictures

    if not all(each.endswith(".txt") for each in given):
        return [each.source for each in find_pictures(given)]
    prompts: list[Any] = []
    for each in given:
        lines = [line.strip() for line in _text_in(Path(each)).splitlines()]
        if not any(lines):
            raise BadInput(f"{each} holds no prompt: write one a line")
        prompts += [line for line in lines if line]
    return prompts


def _words_in(path: Path) -> list[str]:
    return _text_in(path).split()


def _text_in(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: give a text file in UTF-8") from error


def models(format: Output = Format.text) -> None:
    """List the models that are embedded, cached and known."""
    from diptych.weights.catalog import available_models

    known = available_models()
    if format is not Format.text:
        records = [{"short": each.short, **dataclasses.asdict(each)} for each in known]
        lines = [json.dumps(record, default=str, ensure_ascii=False) for record in records]
        print("\n".join(lines) if format is Format.jsonl else f"[{','.join(lines)}]")
        return
    from rich.console import Console
    from rich.table import Table

    names = ("short", "model", "task", "where", "size", "licence", "source")
    table = Table(*names, box=None, pad_edge=False)
    for each in known:
        size = f"{each.size / 1e6:.0f} MB" if each.size else "?"
        told = (each.name, each.task, each.state, size, each.licence, each.source)
        table.add_row(each.short, *told)
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)  # names are for copying: never cut one
    console.print(table)
    if any(each.state == "known" for each in known):
        complain("what is known is fetched from the hub when it is first asked for")
