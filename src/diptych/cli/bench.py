"""The verb `bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from diptych.cli.flags import Output, Task
from diptych.cli.terminal import Format, progress

if TYPE_CHECKING:
    from diptych.evaluation.speed import Timing

__all__ = ["bench"]


def bench(
    model: Annotated[
        str, typer.Argument(help="Name, folder or hub id of a model; default is both of ours.")
    ] = "default",
    task: Task = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, besides one to warm up.")] = 3,
    format: Output = Format.text,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Time a model in every runtime that is installed, on this machine."""
    from diptych.evaluation.speed import captioner_cases, generator_cases, time_in_turns
    from diptych.runtimes.conversion import tasks_of
    from diptych.weights import catalog

    makers = {catalog.CAPTIONS: captioner_cases, catalog.PICTURES: generator_cases}
    cases = [case for each in tasks_of(model, task) for case in makers[each](model)]
    runs = (repeats + 1) * sum(case is not None for _, case in cases)
    with progress("timing", runs, hide=quiet) as advance:
        timings = time_in_turns(cases, repeats, advance)
    if format is Format.text:
        _print_table(timings)
        return
    lines = [json.dumps(each.as_dict(), ensure_ascii=False) for each in timings]
    print("\n".join(lines) if format is Format.jsonl else f"[{','.join(lines)}]")


def _print_table(timings: list[Timing]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from diptych.runtimes.cores import available_cores

    table = Table("model", "work", "runtime", "dtype", "seconds", "", box=None, pad_edge=False)
    for each in timings:
        seconds = "-" if each.median_s is None else f"{each.median_s:.3f}"
        note = f"auto takes this one: {each.note}" if each.chosen else each.note
        words = (each.model, each.work, each.runtime, each.dtype, seconds, note)
        table.add_row(*map(escape, words))  # brackets of an extra are no style
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)  # sentences are for reading: never cut one
    console.print(table)
    print(f"on {available_cores()} cores")
