"""What the verbs that make pictures share: their flags, file names, sheets and progress."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, Protocol

import typer

from diptych.cli.flags import Loading, Output
from diptych.cli.terminal import Format, check_writable, complain, note, real_path
from diptych.errors import BadImage, BadInput, DiptychError

if TYPE_CHECKING:
    from PIL import Image

    from diptych.text_to_image.generated_image import GeneratedImage
    from diptych.text_to_image.generator import ImageGenerator
    from diptych.text_to_image.previews import DenoisingStep

__all__ = [
    "PICTURES",
    "Drawing",
    "FileNames",
    "file_and_number",
    "listing",
    "steps_bar",
    "work",
    "write_sheet",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_PREVIEW_EVERY_S = 0.5
_SLUG_BYTES = 60


@dataclass
class Drawing(Loading):
    """Hold the flags of every verb that makes pictures."""

    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="A file (png, jpg, webp), or a folder; else here."),
    ] = None
    grid: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw all pictures on one sheet, and write it there."),
    ] = None
    preview: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="While at work, keep a blurred picture of what is to come there."),
    ] = None
    preview_vae: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A tiny VAE (TAESD) whose folder makes --preview sharp; needs torch."),
    ] = None
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A LoRA file, or FILE:SCALE; may be given several times."),
    ] = None
    embedding: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="A learned word (textual inversion); may be given several times."),
    ] = None
    format: Output = Format.text
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Say where it runs, and how long it took."),
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False

    def check(self, read: Iterable[object] = ()) -> None:
        """Raise `BadInput` for a file that could not be written in the end, or must not be.

        What is `read` must not be written over, nor one result by another.
        """
        for path in (self.grid, self.preview):
            if path is not None:
                check_writable(path, PICTURES)
        files = [each for each in read if isinstance(each, str | Path)]
        taken = {real_path(each): "is a file that is read" for each in files}
        results = {"--output": self.output, "--grid": self.grid, "--preview": self.preview}
        for option, path in results.items():
            if path is None or path.is_dir():
                continue
            if (real := real_path(path)) in taken:
                raise BadInput(f"{option} {path} {taken[real]}: give another name")
            taken[real] = f"is what {option} names"

    def open(self) -> ImageGenerator:
        """Load the generator with its LoRAs and learned words."""
        from diptych.text_to_image.generator import ImageGenerator

        if (self.lora or self.embedding) and self.runtime == "auto":
            self.runtime = "torch"  # where weights can be changed
        generator = self.load(ImageGenerator.load)
        if self.preview_vae is not None:
            generator.load_preview_vae(self.preview_vae)
        if self.verbose:
            complain(generator.networks.place(generator.model.name))
        for each in self.lora or []:
            generator.load_lora(*file_and_number(each))
        for path in self.embedding or []:
            word = generator.load_textual_inversion(path)
            if self.verbose:
                complain(f"learned word: {word}")
        return generator


def work(
    events: Iterator[DenoisingStep | GeneratedImage],
    name: Callable[[int, GeneratedImage], Path],
    tell: Tell,
    advance: Advance,
    preview: Path | None,
) -> tuple[dict[int, GeneratedImage], int]:
    """Save each picture as it is finished; return those saved by number, and how many failed.

    `name` gives the path of a picture by its number among all that come. A picture that cannot be
    saved ends the work: the next would meet the same full disk.
    """
    from diptych.text_to_image.generated_image import GeneratedImage

    made: dict[int, GeneratedImage] = {}
    number, failed, shown = -1, 0, 0.0
    for event in events:
        if not isinstance(event, GeneratedImage):
            advance(event)
            if preview is not None and time.monotonic() - shown > _PREVIEW_EVERY_S:
                write_sheet(event.previews(), preview)
                shown = time.monotonic()
            continue
        number += 1
        for text in event.notes:
            note(text)
        if event.error is not None:
            failed += 1
            # What is wrong with a file names the file; all else is told by the prompt.
            is_of_file = isinstance(event.error, BadImage) or not event.prompt
            complain(f"{'' if is_of_file else f'{event.prompt[:60]!r}: '}{event.error}")
            tell(event.as_dict(), None)
            continue
        path = name(number, event)
        try:
            event.save(path)
        except DiptychError as error:
            complain(str(error))
            return made, failed + 1
        made[number] = event
        tell(event.as_dict(), path)
    return made, failed


def file_and_number(text: str) -> tuple[str, float]:
    """Split FILE:NUMBER; the number of a file alone is 1."""
    path, _, number = text.rpartition(":")
    try:
        return (path, float(number)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


class FileNames:
    """Think of a name for each picture; only a name that was given in full is ever used again."""

    def __init__(self, output: Path | None, pictures: int) -> None:
        self.folder, self.file, self.several = Path(), None, pictures > 1
        self.number = 0
        self.digits = max(4, len(str(pictures)))
        if output is not None and _is_file_name(output):
            check_writable(output, PICTURES)
            self.folder, self.file = output.parent, output
        elif output is not None:
            self.folder = output
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"{output}: is no folder, nor can be ({error.strerror})") from error
        self.in_folder = output is not None and self.file is None

    def next(self, prompt: str, seed: int) -> Path:
        """Return the path of the next picture."""
        self.number += 1
        if self.file is not None and not self.several:
            return self.file
        if self.file is not None:
            stem, suffix = f"{self.file.stem}-{self.number}", self.file.suffix
        else:
            stem, suffix = f"{slug(prompt)}-{seed}", ".png"
        if self.in_folder:
            stem = f"{self.number:0{self.digits}}-{stem}"
        path, again = self.folder / f"{stem}{suffix}", 1
        while path.exists() or path.is_symlink():
            again += 1
            path = self.folder / f"{stem}-{again}{suffix}"
        return path


def _is_file_name(output: Path) -> bool:
    return not output.is_dir() and output.suffix != ""


def slug(prompt: str) -> str:
    """Return the words of a prompt as a part of a file name, at most 60 bytes."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    short = words.encode("utf-8", "replace")[:_SLUG_BYTES].decode("utf-8", "ignore").strip("-_")
    return short or "picture"


class Tell(Protocol):
    """Print one picture: its settings, and the file it is in."""

    def __call__(self, record: dict[str, Any], path: Path | None) -> None: ...


@contextmanager
def listing(format: Format) -> Iterator[Tell]:
    """Print what was made as it comes: names, or JSON, which stays whole when interrupted."""
    count = 0

    def tell(record: dict[str, Any], path: Path | None) -> None:
        nonlocal count
        if format is Format.text:
            if path is not None:
                print(path, flush=True)
            return
        line = json.dumps({"file": path and str(path), **record}, ensure_ascii=False)
        if format is Format.json:
            line = ("[\n" if count == 0 else ",\n") + line
        print(line, end="" if format is Format.json else "\n", flush=True)
        count += 1

    try:
        yield tell
    finally:
        if format is Format.json:
            print("\n]" if count else "[]", flush=True)


class Advance(Protocol):
    """Take note of a denoising step."""

    def __call__(self, step: DenoisingStep) -> None: ...


@contextmanager
def steps_bar(pictures: int, *, hide: bool) -> Iterator[Advance]:
    """Show a bar on stderr that counts steps and tells the time left, if somebody is there."""
    if hide or sys.stderr is None or not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("step {task.fields[step]}"),
        TextColumn("· {task.fields[done]} of {task.fields[pictures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=None, step="", done=0, pictures=pictures)
        done = 0

        def advance(step: DenoisingStep) -> None:
            nonlocal done
            bar.update(
                task,
                description=step.prompts[0][:32],
                total=pictures * step.total,
                completed=done * step.total + (step.index + 1) * len(step.orders),
                step=f"{step.index + 1}/{step.total}",
                done=done,
            )
            done += len(step.orders) if step.is_last else 0

        yield advance


def write_sheet(
    pictures: Sequence[Image.Image],
    path: Path,
    *,
    columns: int | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write pictures as one; rows and columns of about the same number where none is given."""
    from PIL import Image

    from diptych.images import contact_sheet
    from diptych.text_to_image.generated_image import write_whole

    sheet = pictures[0]
    if len(pictures) > 1:
        columns = columns or math.ceil(math.sqrt(len(pictures)))
        sheet = contact_sheet(pictures, columns, labels=labels)
    data = io.BytesIO()
    sheet.save(data, Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, data.getvalue())
