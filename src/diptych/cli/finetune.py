"""The verbs `finetune generator` and `finetune captioner`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.cli.flags import Device, Model, Output, Revision, with_options
from diptych.cli.terminal import INTERRUPTED, Format, complain
from diptych.cli.verbs import without_frills
from diptych.errors import BadInput

if TYPE_CHECKING:
    from diptych.training.data import Advance
    from diptych.training.finetune import Reporting
    from diptych.training.loop import Finished

__all__ = ["app"]

app = without_frills(no_args_is_help=True, help="Teach a model from your own pictures.")

Data = Annotated[
    Path,
    typer.Argument(help="A folder of pictures with captions, a metadata file, .tar or .parquet."),
]


@dataclasses.dataclass
class Training:
    """Hold the flags of every verb that trains."""

    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The folder of the run: checkpoints and results."),
    ] = None
    model: Model = "default"
    device: Device = "auto"
    revision: Revision = None
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint in the output folder.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option(help="Check the pictures, say what was found, and stop there.")
    ] = False
    format: Output = Format.text
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False

    def folder(self) -> Path:
        """Return the folder of the run; raises `BadInput` where none is named."""
        if self.output is None:
            raise BadInput("no folder to write to: give --output DIR")
        return self.output


@app.command("generator")
@with_options("GeneratorTrainOptions", shared=("training", Training))
def generator(
    data: Data,
    *,
    options: Any,
    training: Training,
    caption_with: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A captioner for pictures without captions, as in default."),
    ] = None,
) -> None:
    """Train a LoRA, a subject, a word or all weights of a generator."""
    _need_torch()
    from diptych.training.finetune import finetune_generator

    if training.dry_run:
        _show_data(data, options, training, caption_with)
    else:
        _train(finetune_generator, data, options, training, caption_with=caption_with)


@app.command("captioner")
@with_options("CaptionerTrainOptions", shared=("training", Training))
def captioner(
    data: Data,
    *,
    options: Any,
    training: Training,
    encoder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A ViT to begin a new captioner with, as google/vit-base-patch16-224."),
    ] = None,
    decoder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A GPT-2 to begin a new captioner with, as gpt2."),
    ] = None,
) -> None:
    """Train a captioner on pictures with captions."""
    _need_torch()
    from diptych.training.finetune import finetune_captioner

    if training.dry_run:
        _show_data(data, options, training, None)
    else:
        _train(finetune_captioner, data, options, training, encoder=encoder, decoder=decoder)


def _train(
    finetune: Callable[..., Finished], data: Path, options: Any, training: Training, **own: Any
) -> None:
    """Run one of the two, show how it goes and how it ended; `own` are its own arguments."""
    with _reporting(training, options) as reporting:
        finished = finetune(
            data,
            training.folder(),
            training.model,
            options,
            device=training.device,
            revision=training.revision,
            resume=training.resume,
            reporting=reporting,
            **own,
        )
    _show_end(finished, training)


def _need_torch() -> None:
    from diptych.runtimes.network import require_torch

    require_torch("training", "train")


def _show_data(data: Path, options: Any, training: Training, caption_with: str | None) -> None:
    from diptych.training.finetune import Reporting, read_data

    with _counting(training.quiet) as advance:
        captions = None if training.output is None else training.output / "captions.jsonl"
        if caption_with is not None and captions is None:
            raise BadInput("captions are written to the folder of the run: give --output DIR")
        dataset = read_data(
            data,
            options,
            captions=captions,
            caption_with=caption_with,
            reporting=Reporting(advance=advance),
        )
    if training.format is Format.text:
        print(dataset.report.as_text())
    else:
        indent = 2 if training.format is Format.json else None
        print(json.dumps(dataset.report.as_dict(), indent=indent, ensure_ascii=False))


def _show_end(finished: Finished, training: Training) -> None:
    if not finished.files:
        return  # one of several processes: the first one tells
    if training.format is not Format.text:
        record = {
            "folder": str(finished.folder),
            "files": [str(path) for path in finished.files],
            "step": finished.step,
            "best_step": finished.best_step,
            "validation": {
                "start": finished.start,
                "end": finished.end,
                "change": finished.change,
            },
        }
        print(json.dumps(record, indent=2 if training.format is Format.json else None))
        return
    for path in finished.files:
        print(path)
    if finished.change is not None:
        complain(
            f"validation loss {finished.start:.4f} at the start, {finished.end:.4f} now "
            f"({100 * finished.change:+.1f} %); see {finished.folder / 'report.html'}"
        )


@contextmanager
def _reporting(training: Training, options: Any) -> Iterator[Reporting]:
    """Show what a run tells; when it is stopped, say how to go on."""
    from diptych.training.finetune import Reporting
    from diptych.training.stopping import Stopped

    with _counting(training.quiet) as advance:
        tell = None if training.quiet else _Rows(options)
        note = (lambda text: None) if training.quiet else complain
        try:
            yield Reporting(tell, note, advance)
        except Stopped as stopped:
            words = [word for word in sys.argv[1:] if word != "--resume"]
            again = shlex.join(["diptych", *words, "--resume"])
            complain(f"stopped at step {stopped.step}, nothing is lost; go on with: {again}")
            raise typer.Exit(INTERRUPTED) from stopped


class _Rows:
    """Print rows of metrics: validation always, steps every few seconds."""

    _EVERY_S = 5.0

    def __init__(self, options: Any) -> None:
        self._shown, self._total = 0.0, options.max_train_steps

    def __call__(self, row: dict[str, Any]) -> None:
        if found := row.get("validation"):
            complain(
                f"step {row['step']}: validation loss {found['loss']:.4f} "
                f"({100 * found['change']:+.1f} %)"
            )
            if "warning" in row:
                complain(row["warning"])
            for each in row.get("captions", ()):
                complain(f"  {each['file']}: {each['caption']}")
            return
        if time.monotonic() - self._shown < self._EVERY_S:
            return
        self._shown = time.monotonic()
        left = "" if row["eta_s"] is None else f", {_duration(row['eta_s'])} to go"
        memory = "" if row["memory_mb"] is None else f", {row['memory_mb']} MB"
        complain(
            f"step {row['step']}: loss {row['loss']:.4f}, {row['images_per_s']:.3g} pictures a "
            f"second{memory}{left}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def _counting(hide: bool) -> Iterator[Callable[[int], Advance]]:
    """Count pictures as they are read, if somebody is there to see it."""
    if hide or sys.stderr is None or not sys.stderr.isatty():
        yield lambda total: lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:

        def begin(total: int) -> Advance:
            task = bar.add_task("reading pictures", total=total)
            return lambda: bar.advance(task)

        yield begin
