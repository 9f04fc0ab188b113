"""The verb `caption`."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.cli.flags import BatchSize, Loading, Output, with_options
from diptych.cli.terminal import (
    FAILED,
    SOME_FAILED,
    Format,
    check_writable,
    complain,
    progress,
    real_path,
)
from diptych.errors import BadInput

if TYPE_CHECKING:
    from diptych.image_to_text.caption import Caption

__all__ = ["caption"]


@with_options("CaptionOptions", shared=("loading", Loading))
def caption(
    paths: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, URLs, or - for standard input.")
    ],
    *,
    options: Any,
    loading: Loading,
    format: Output = Format.text,
    batch_size: BatchSize = 8,
    heatmap: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw where the model looked for each word of one picture."),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print probability (a word, on average) and time, and where it runs.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
    alpha: Annotated[
        str, typer.Option(help="Lay transparent pictures on white, or drop their transparency.")
    ] = "white",
    allow_urls: Annotated[bool, typer.Option(help="Allow http(s) addresses as pictures.")] = False,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest file to read.")] = 64 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest picture to decode.")] = 64_000_000,
) -> None:
    """Describe pictures in words."""
    from diptych.image_to_text.captioner import Captioner
    from diptych.images import ImageLimits
    from diptych.inputs import find_pictures

    inputs = find_pictures(paths)
    if heatmap is not None:
        if len(inputs) != 1:
            raise BadInput(f"--heatmap draws one picture, and {len(inputs)} were given: give one")
        check_writable(heatmap, (".png", ".jpg", ".jpeg", ".webp"))
        if real_path(heatmap) == real_path(inputs[0].source):
            raise BadInput(f"--heatmap {heatmap} is a file that is read: give another name")
    _give_back_memory(1 << 17, 1 << 17)
    captioner = loading.load(Captioner.load)
    # Small devices are what int4 is for; glibc itself ends at these others, which cost no time.
    thresholds = (1 << 20, 4 << 20) if captioner.model.precision == "int4" else (32 << 20, 64 << 20)
    _give_back_memory(*thresholds)
    if verbose:
        complain(captioner.networks.place(captioner.model.name))
    reading: dict[str, Any] = {
        "alpha": alpha,
        "limits": ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels),
        "allow_urls": allow_urls,
    }
    made = captioner.captions(
        (each.source for each in inputs), options, batch_size=batch_size, **reading
    )
    printer = Printer(format, verbose=verbose, alone=len(inputs) == 1)
    failed = 0
    try:
        with progress("captioning", len(inputs), hide=quiet) as advance:
            for each, (result, seconds) in zip(inputs, timed(made, batch_size), strict=True):
                printer.print(each.name, result, seconds)
                if result.error is not None:
                    failed += 1
                    complain(f"{each.name}: {result.error.reason}")
                elif heatmap is not None:
                    draw_heatmap(result, each.source, heatmap, reading)
                advance()
    finally:
        printer.close()
    if failed:
        raise typer.Exit(FAILED if failed == len(inputs) else SOME_FAILED)


def _give_back_memory(block: int, top: int) -> None:
    """Let glibc return freed blocks of `block` bytes at once, and `top` at the heap's end.

    It learns both from what a program frees, and keeps what a model was made of while loading:
    some 20 MB (`docs/lab-notes.md`).
    """
    trim_threshold, mmap_threshold = -1, -3
    with suppress(AttributeError, OSError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, block)
        library.mallopt(trim_threshold, top)


class Printer:
    """Print captions as they come, in one of the formats."""

    def __init__(self, format: Format, *, verbose: bool, alone: bool) -> None:
        self.format, self.verbose, self.alone = format, verbose, alone
        self.count = 0

    def print(self, name: str, caption: Caption, seconds: float) -> None:
        if self.format is not Format.text:
            self._print_record({"file": name, **caption.as_dict(), "seconds": round(seconds, 4)})
        elif caption.error is None:
            for each in (caption, *caption.alternatives):
                line = each.text if self.alone else f"{name}: {each.text}"
                if self.verbose:
                    line += f"  (probability {each.probability:.2f}, {seconds:.2f} s)"
                print(line, flush=True)
        self.count += 1

    def _print_record(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False)
        if self.format is Format.json:
            line = ("[\n" if self.count == 0 else ",\n") + line
        print(line, end="" if self.format is Format.json else "\n", flush=True)

    def close(self) -> None:
        """End the JSON list, also after an interruption: what was printed stays readable."""
        if self.format is Format.json:
            print("\n]" if self.count else "[]", flush=True)


def timed(captions: Iterator[Caption], batch_size: int) -> Iterator[tuple[Caption, float]]:
    """Yield each caption with the seconds it took: its batch's time, shared evenly."""
    while True:
        start = time.perf_counter()
        batch = [caption for _, caption in zip(range(batch_size), captions, strict=False)]
        if not batch:
            return
        share = (time.perf_counter() - start) / len(batch)
        yield from ((caption, share) for caption in batch)


def draw_heatmap(caption: Caption, source: Any, path: Path, reading: Mapping[str, Any]) -> None:
    """Write one panel a word: the photo with the places that the word looked at.

    `reading` is how to open the photo: the words of `open_image`.
    """
    from diptych.images import contact_sheet, open_image, overlay_heatmap

    photo = open_image(source, **reading)
    photo.thumbnail((320, 320))
    panels = [
        overlay_heatmap(photo, caption.heatmap(index), label=word)
        for index, word in enumerate(caption.words)
    ]
    if not panels:
        raise BadInput("the caption has no words to draw a heatmap of")
    try:
        contact_sheet(panels, columns=min(4, len(panels))).save(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: the heatmap cannot be written ({error})") from error
    complain(f"heatmap: {path}")
