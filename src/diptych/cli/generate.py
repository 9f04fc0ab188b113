"""The verb `generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from diptych.cli.drawing import Drawing, FileNames, listing, steps_bar, work, write_sheet
from diptych.cli.flags import with_options
from diptych.cli.terminal import FAILED, SOME_FAILED, complain, note
from diptych.errors import BadInput

__all__ = ["generate"]


@with_options("GenerateOptions", without=("strength",), shared=("drawing", Drawing))
def generate(
    prompts: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="What to draw; - reads prompts from standard input, one a line."),
    ] = None,
    *,
    options: Any,
    drawing: Drawing,
    prompts_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--prompts", help="A text file with more prompts, one a line."),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Pictures made together; else what fits the size."),
    ] = None,
) -> None:
    """Draw what words say."""
    wanted = read_prompts(prompts or [], prompts_file)
    if len(prompts or []) > 1 and not any(" " in each for each in prompts or []):
        note(
            f"{len(wanted)} prompts of one word each are drawn: put quotes around a prompt of "
            "several words"
        )
    pictures = len(wanted) * options.num_images_per_prompt
    names = FileNames(drawing.output, pictures)
    drawing.check()
    generator = drawing.open()
    started = time.perf_counter()
    events = generator.follow(wanted, options, batch_size=batch_size)
    with listing(drawing.format) as tell, steps_bar(pictures, hide=drawing.quiet) as advance:
        made, failed = work(
            *(events, lambda _, each: names.next(each.prompt, each.seed), tell, advance),
            drawing.preview,
        )
    if drawing.verbose:
        complain(f"{len(made)} of {pictures} in {time.perf_counter() - started:.1f} s")
    if drawing.grid is not None and made:
        write_sheet([picture.image for picture in made.values()], drawing.grid)
        complain(f"grid: {drawing.grid}")
    if failed or len(made) < pictures:
        raise typer.Exit(SOME_FAILED if made else FAILED)


def read_prompts(arguments: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of the arguments, of standard input for -, and of the file's lines.

    Raises `BadInput` where there is none, or one that is empty.
    """
    prompts: list[str] = []
    for argument in arguments:
        if argument == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise BadInput("- reads prompts from standard input: pipe some in, one a line")
            prompts += _lines(sys.stdin.buffer.read(), "standard input")
        elif not argument.strip():
            raise BadInput("a prompt is empty: is a variable of the shell empty?")
        else:
            prompts.append(argument)
    if file is not None:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BadInput(f"{file}: cannot be read ({error.strerror})") from error
        prompts += _lines(data, str(file))
    if not prompts:
        raise BadInput("no prompt given: say what to draw, as in diptych generate 'a red tulip'")
    return prompts


def _lines(data: bytes, name: str) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: prompts are read as UTF-8 text, and this is none") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
