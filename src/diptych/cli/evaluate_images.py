"""The verb `evaluate images`: whether pictures of scenes show what their prompts say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.cli.drawing import file_and_number
from diptych.cli.flags import Loading, Output, with_options
from diptych.cli.terminal import SOME_FAILED, Format, complain, progress
from diptych.errors import BadInput, DiptychError

if TYPE_CHECKING:
    from PIL import Image

    from diptych.evaluation.adherence import AdherenceReport, Score
    from diptych.evaluation.scenes import ScenePrompt
    from diptych.text_to_image.generator import ImageGenerator

__all__ = ["evaluate_images"]


@with_options("GenerateOptions", without=("strength",), shared=("loading", Loading))
def evaluate_images(
    pictures: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            help="JSON lines with 'file' and 'prompt' of pictures to judge; else a model draws."
        ),
    ] = None,
    *,
    options: Any,
    loading: Loading,
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts to draw.")] = 300,
    prompts_seed: Annotated[int, typer.Option(min=0, help="Another seed, other prompts.")] = 2024,
    save_images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep the pictures and their judgements in this folder."),
    ] = None,
    format: Output = Format.text,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Pictures made together; else as many as suits the device."),
    ] = None,
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A LoRA file, or FILE:SCALE, that the model draws with."),
    ] = None,
) -> None:
    """Check drawn scenes for objects, colours, counts and places, beside what chance scores."""
    from diptych.evaluation.adherence import read_scene_prompts, report
    from diptych.evaluation.scenes import evaluation_prompts

    if save_images is not None:
        _make_folder(save_images)
    if pictures is not None:
        prompts, files = read_scene_prompts(pictures)
        seen = read_pictures(files)
    else:
        from diptych.text_to_image.generator import ImageGenerator

        if lora and loading.runtime == "auto":
            loading.runtime = "torch"  # where weights can be changed
        generator = loading.load(ImageGenerator.load)
        for each in lora or []:
            generator.load_lora(*file_and_number(each))
        repeats = range(options.num_images_per_prompt)
        prompts = [each for each in evaluation_prompts(count, prompts_seed) for _ in repeats]
        options = options.replace(num_images_per_prompt=1, seed=options.seed or 0)
        seen = draw_pictures(generator, prompts, options, batch_size)
    keeping = _Keeping(save_images)
    found = report(prompts, keeping.each(seen))
    if keeping.missing == len(prompts):
        if pictures is None:
            raise DiptychError("not one of the pictures could be made")
        raise BadInput("not one of the pictures can be read: paths are relative to the JSON lines")
    failed = keeping.missing + keeping.end(prompts, found)
    if format is not Format.text:
        print(json.dumps(found.as_dict(), indent=2 if format is Format.json else None))
    else:
        print_adherence(found)
    if failed:
        raise typer.Exit(SOME_FAILED)


def read_pictures(files: Sequence[Path]) -> Iterator[Image.Image | None]:
    """Yield every picture, None where it cannot be read."""
    from diptych.images import open_image

    for path in files:
        try:
            yield open_image(path)
        except DiptychError as error:
            complain(f"{path}: {error}")
            yield None


def draw_pictures(
    generator: ImageGenerator,
    prompts: Sequence[ScenePrompt],
    options: Any,
    batch_size: int | None,
) -> Iterator[Image.Image | None]:
    """Yield a picture for every prompt, picture i from seed + i; None for those that failed."""
    with progress("drawing", len(prompts)) as advance:
        texts = [each.prompt for each in prompts]
        for made in generator.images(texts, options, batch_size=batch_size):
            if made.error is not None:
                complain(f"{made.prompt}: {made.error}")
            yield None if made.error is not None else made.image
            advance()


class _Keeping:
    """Write pictures to a folder as they come, where there is one, and count what is missing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.missing, self.is_asked = folder, 0, folder is not None

    def each(self, pictures: Iterable[Image.Image | None]) -> Iterator[Image.Image]:
        """Yield what is to be judged: blank pictures in the place of missing ones."""
        for number, picture in enumerate(pictures):
            self.missing += picture is None
            shown = _nothing() if picture is None else picture
            if self.folder is not None:
                self._write(shown.save, f"{number:04}.png")
            yield shown

    def end(self, prompts: Sequence[ScenePrompt], found: AdherenceReport) -> int:
        """Write lines that `evaluate images` reads back; return 1 where something was not kept."""
        lines = []
        for number, prompt in enumerate(prompts):
            objects = [[each.colour, each.shape] for each in found.found[number]]
            record = {"file": f"{number:04}.png", "prompt": prompt.prompt, "task": prompt.task}
            passed = found.judgements[number].passed
            lines.append(json.dumps({**record, "passed": passed, "found": objects}) + "\n")
        if self.folder is not None:
            self._write(lambda path: path.write_text("".join(lines), "utf-8"), "pictures.jsonl")
        return int(self.is_asked and self.folder is None)

    def _write(self, write: Callable[[Path], object], name: str) -> None:
        assert self.folder is not None
        try:
            write(self.folder / name)
        except OSError as error:  # the scores are told all the same
            complain(f"{self.folder / name}: cannot be written ({error.strerror or error})")
            self.folder = None


def _nothing() -> Image.Image:
    """Return what a picture that could not be made or read is judged as."""
    from PIL import Image

    return Image.new("RGB", (128, 128), "white")


def print_adherence(found: AdherenceReport) -> None:
    """Print a row for each task, then those over all pictures, chance beside each."""
    from rich.console import Console
    from rich.table import Table

    chance = ("wrong prompts", "guessing")
    table = Table("", "score", "95 % interval", *chance, "pictures", box=None, pad_edge=False)
    for name, score in found.tasks.items():
        table.add_row(name, *_cells(score))
    table.add_section()
    for name, score in found.overall.items():
        table.add_row(f"all: {name}", *_cells(score))
    Console(width=120).print(table)


def _cells(score: Score) -> list[str]:
    low, high = score.interval
    guess = "" if score.guess is None else f"{score.guess:.1%}"
    interval = f"{low:.1%} to {high:.1%}"
    dealt = "-" if score.dealt is None else f"{score.dealt:.1%}"
    return [f"{score.share:.1%}", interval, dealt, guess, str(score.num)]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: no such folder can be made ({error})") from error
