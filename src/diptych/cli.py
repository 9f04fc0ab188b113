"""Open the door for the command line: `diptych <verb>`; flags are built from the options.

stdout carries the result, stderr progress and complaints. Exit codes: 0 ok, 1 failed, 2 usage,
3 some inputs failed, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.errors import BadImage, BadInput, DiptychError

if TYPE_CHECKING:
    from diptych.evaluation.captions import CaptionReport
    from diptych.image_to_text.caption import Caption
    from diptych.image_to_text.captioner import Captioner

__all__ = ["app", "main"]

FAILED, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="diptych",
    help="Pictures into words, on this machine.",
    no_args_is_help=True,
    # Rich draws help prettily, and takes longer to import than the whole of diptych: plain is fast.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Measure a model on data with answers."
)
app.add_typer(evaluate_app, name="evaluate")


class Format(StrEnum):
    """Name the ways to print results."""

    text = "text"
    json = "json"
    jsonl = "jsonl"


Model = Annotated[str, typer.Option("--model", "-m", help="Name, folder or hub id of a model.")]
Revision = Annotated[Optional[str], typer.Option(help="Commit or branch of a hub model.")]  # noqa: UP045
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime or torch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures captioned together.")]
Output = Annotated[Format, typer.Option("--format", "-f", help="How to print the results.")]


def main() -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name or caption that the terminal cannot show is shown escaped, not fatal.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:
            complain("interrupted")
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader left (`| head`): say nothing, and keep Python from flushing into the void.
        sys.stdout = None
        sys.exit(0)
    except DiptychError as error:
        complain(str(error))
        usage = isinstance(error, BadInput) and not isinstance(error, BadImage)
        sys.exit(USAGE if usage else FAILED)
    except Exception as error:
        # Click's own complaints: an unknown flag, a missing argument.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(USAGE)


def with_options(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb one flag for each field of the options dataclass named `kind`.

    The verb receives the filled dataclass as its argument `options`.
    """

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            fields = dataclasses.fields(options_class())
            asked = {f.name: values.pop(f.name) for f in fields}
            asked = {name: _meant(value) for name, value in asked.items() if value is not None}
            return verb(options=options_class()().replace(**asked), **values)

        def options_class() -> Any:
            from diptych.image_to_text import options as module

            return getattr(module, kind)

        signature = inspect.signature(verb, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "options"]
        flags = [_flag(field) for field in dataclasses.fields(options_class())]
        parameters = [*own, *flags]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = verb.__name__, verb.__doc__
        return run

    return decorate


def _flag(field: Any) -> inspect.Parameter:
    """Describe one field of an options dataclass to Typer."""
    meta = field.metadata
    kind = str if "never" in meta["choices"] else meta["kind"]
    dashed = f"--{field.name.replace('_', '-')}"
    names = [f"{dashed}/--no-{dashed[2:]}"] if kind is bool else [dashed]
    default = "the model's" if meta["from_model"] else str(meta["default"] or "none")
    option = typer.Option(*names, help=meta["help"], show_default=default)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], option],  # noqa: UP045
    )


def _meant(value: Any) -> Any:
    """Turn the words true and false of a flag with several choices into what they mean."""
    if not isinstance(value, str):
        return value
    return {"true": True, "false": False}.get(value.lower(), value)


@app.command()
@with_options("CaptionOptions")
def caption(
    paths: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, URLs, or - for standard input.")
    ],
    *,
    options: Any,
    model: Model = "default",
    format: Output = Format.text,
    batch_size: BatchSize = 8,
    heatmap: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw where the model looked for each word of one picture."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print probability and time as well.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
    alpha: Annotated[
        str, typer.Option(help="Lay transparent pictures on white, or drop their transparency.")
    ] = "white",
    allow_urls: Annotated[bool, typer.Option(help="Allow http(s) addresses as pictures.")] = False,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest file to read.")] = 64 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest picture to decode.")] = 64_000_000,
    runtime: Runtime = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
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
    captioner = Captioner.load(
        model, runtime=runtime, device=device, dtype=dtype, revision=revision
    )
    if verbose:
        complain(f"{captioner.model.name}: {captioner.networks.reason}")
    made = captioner.captions(
        (each.source for each in inputs),
        options,
        batch_size=batch_size,
        alpha=alpha,  # type: ignore[arg-type]
        limits=ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels),
        allow_urls=allow_urls,
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
                    draw_heatmap(result, each.source, heatmap)
                advance()
    finally:
        printer.close()
    if failed:
        raise typer.Exit(FAILED if failed == len(inputs) else SOME_FAILED)


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


def draw_heatmap(caption: Caption, source: Any, path: Path) -> None:
    """Write one panel a word: the photo with the places that the word looked at."""
    from diptych.images import contact_sheet, open_image, overlay_heatmap

    photo = open_image(source)
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


def check_writable(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raise `BadInput` before the work is done, not after it, for a file that cannot be written."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise BadInput(f"{path}: give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: cannot be written; is it in a folder that exists?")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Name, folder or hub id of a model.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the ONNX files.")],
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="int8, for a quarter of the size and more speed."),
    ] = None,
    images: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Pictures on which to compare captions; files, folders or globs."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a model as ONNX files that run without torch, and compare both word by word."""
    from diptych.image_to_text.captioner import export as export_model
    from diptych.inputs import find_pictures

    sources = [each.source for each in find_pictures(images)] if images else None
    found = export_model(model, folder, quantize=quantize, images=sources, revision=revision)
    print(json.dumps(found, indent=2))
    complain(f"written to {folder}")


@app.command()
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

    table = Table("model", "where", "size", "licence", "source", box=None, pad_edge=False)
    for each in known:
        size = f"{each.size / 1e6:.0f} MB" if each.size else "?"
        table.add_row(each.name, each.state, size, each.licence, each.source)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # names are for copying: never cut one
    console.print(table)


@evaluate_app.command("captions")
@with_options("CaptionOptions")
def evaluate_captions(
    references: Annotated[
        Path, typer.Argument(help="JSON lines with 'file' and 'captions', and maybe 'split'.")
    ],
    *,
    options: Any,
    model: Model = "default",
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
    runtime: Runtime = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
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

        captioner = Captioner.load(
            model, runtime=runtime, device=device, dtype=dtype, revision=revision
        )
        paths = [each.path for each in described]
        texts, failed = caption_texts(captioner, paths, options, batch_size)
    if save_captions is not None:
        rows = zip(described, texts, strict=True)
        lines = [json.dumps({"file": str(d.path), "text": text}) + "\n" for d, text in rows]
        save_captions.write_text("".join(lines), encoding="utf-8")
    found = report(texts, [each.captions for each in described])
    if format is not Format.text:
        print(json.dumps(found.as_dict(), indent=2 if format is Format.json else None))
    else:
        print_report(found)
    if failed:
        raise typer.Exit(SOME_FAILED)


def print_report(found: CaptionReport) -> None:
    """Print the scores as a table, blind baselines below them."""
    from rich.console import Console
    from rich.table import Table

    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "length_ratio")
    table = Table("", *names, box=None, pad_edge=False)
    rows_of_scores = {
        "captions": found.scores,
        "blind: dealt to wrong pictures": found.blind,
        f"constant: {found.constant_caption}": found.constant,
    }
    for title, scores in rows_of_scores.items():
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


class progress:
    """Show a bar on stderr for more than a few things, if somebody is there to see it."""

    def __init__(self, title: str, total: int, hide: bool = False) -> None:
        self.title, self.total = title, total
        self.shown = total > 3 and not hide and sys.stderr.isatty()

    def __enter__(self) -> Callable[[], None]:
        if not self.shown:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task(self.title, total=self.total)
        return lambda: self.bar.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.bar.stop()


def complain(message: str) -> None:
    """Write one line to stderr."""
    print(f"diptych: {message}", file=sys.stderr, flush=True)


def _version(value: bool) -> None:
    if value:
        from diptych import __version__

        print(f"diptych {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
