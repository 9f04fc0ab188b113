"""The verbs that make pictures out of pictures: `img2img`, `inpaint` and `stylize`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from diptych.cli.drawing import (
    Drawing,
    FileNames,
    file_and_number,
    listing,
    steps_bar,
    work,
    write_sheet,
)
from diptych.cli.flags import with_options
from diptych.cli.terminal import FAILED, SOME_FAILED, complain, note
from diptych.errors import BadInput

if TYPE_CHECKING:
    from diptych.inputs import Picture
    from diptych.text_to_image.generated_image import GeneratedImage
    from diptych.text_to_image.generator import ImageGenerator
    from diptych.text_to_image.painter import Event

__all__ = ["NOT_OF_STYLE", "img2img", "inpaint", "stylize"]

Pictures = Annotated[
    list[str], typer.Argument(help="Files, folders, globs, or - for standard input.")
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What the result should show.")]
Strengths = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Several strengths to compare, as in 0.3,0.6,0.9; with --grid alone 0.2 to 1."
    ),
]
Mask = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--mask", "-k", help="Where to paint: a picture, white there."),
]
_COMPARED = (0.2, 0.4, 0.6, 0.8, 1.0)


@with_options("ImageToImageOptions", shared=("drawing", Drawing))
def img2img(
    pictures: Pictures,
    *,
    options: Any,
    drawing: Drawing,
    prompt: Prompt = "",
    strengths: Strengths = None,
) -> None:
    """Make pictures out of others, led by words."""

    def follow(generator: ImageGenerator, sources: list[Any], asked: Any) -> Iterator[Event]:
        return generator.follow(prompt, asked, image=sources)

    if not prompt:
        note("no --prompt is given: nothing but the picture leads the way")
    _edit(pictures, options, drawing, follow, ("strength", strengths))


@with_options("InpaintOptions", shared=("drawing", Drawing))
def inpaint(
    pictures: Pictures,
    *,
    options: Any,
    drawing: Drawing,
    mask: Mask = None,
    prompt: Prompt = "",
    strengths: Strengths = None,
) -> None:
    """Repaint a part of pictures, or extend them; all else comes back bit for bit."""
    if mask is None and options.extend is None:
        raise BadInput("nothing says where to paint: give --mask FILE, or --extend left=64")

    def follow(generator: ImageGenerator, sources: list[Any], asked: Any) -> Iterator[Event]:
        return generator.follow(prompt, asked, image=sources, mask_image=mask)

    _edit(pictures, options, drawing, follow, ("strength", strengths), read=[mask])


# What only chance and other samplers would need.
NOT_OF_STYLE = (
    *("strength", "num_inference_steps", "seed", "num_images_per_prompt", "sampler", "schedule"),
    *("timestep_spacing", "eta", "noise_source", "guidance_rescale", "guidance_interval"),
    *("reuse_interval", "token_merging_ratio"),
)


@with_options("StyleOptions", without=NOT_OF_STYLE, shared=("drawing", Drawing))
def stylize(
    pictures: Pictures,
    *,
    options: Any,
    drawing: Drawing,
    style: Annotated[
        list[str],
        typer.Option(
            "--style", "-s", help="A picture, or FILE:WEIGHT; may be given several times."
        ),
    ],
    mask: Mask = None,
    prompt: Prompt = "",
    strengths: Strengths = None,
) -> None:
    """Give pictures the style of another."""
    styles, weights = zip(*(file_and_number(each) for each in style), strict=True)

    def follow(generator: ImageGenerator, sources: list[Any], asked: Any) -> Iterator[Event]:
        return generator.follow_style(
            sources,
            [Path(each) for each in styles],
            asked,
            prompt=prompt,
            style_weights=weights,
            mask_image=mask,
        )

    _edit(pictures, options, drawing, follow, ("style_strength", strengths), read=[mask, *styles])


def _edit(
    paths: Sequence[str],
    options: Any,
    drawing: Drawing,
    follow: Callable[[ImageGenerator, list[Any], Any], Iterator[Event]],
    varied: tuple[str, str | None],
    read: Sequence[object] = (),
) -> None:
    """Make one picture of each input, at each of the strengths that are compared.

    `read` are files beside the inputs that must not be written over.
    """
    from diptych.inputs import find_pictures

    inputs = find_pictures(paths)
    field, given = varied
    levels = _levels(field, given, has_grid=drawing.grid is not None)
    each = options.num_images_per_prompt
    if levels and field == "strength" and options.seed is None:
        # One for all: strengths are compared, not chance.
        options = options.replace(seed=secrets.randbelow(2**32))
    asked = [options.replace(**{field: level}) for level in levels] or [options]
    pictures = len(inputs) * each * len(asked)
    names = FileNames(drawing.output, pictures)
    drawing.check([*(each.source for each in inputs), *read])
    generator = drawing.open()
    started = time.perf_counter()
    made: list[tuple[int, int, GeneratedImage]] = []
    failed = 0

    def name(number: int, picture: GeneratedImage, told: str) -> Path:
        return names.next(f"{Path(inputs[number // each].name).stem}{told}", picture.seed)

    with listing(drawing.format) as tell, steps_bar(pictures, hide=drawing.quiet) as advance:
        for level, wanted in enumerate(asked):
            told = f"-{levels[level]:g}" if levels else ""
            events = follow(generator, [one.source for one in inputs], wanted)
            done, broken = work(*(events, partial(name, told=told), tell, advance), drawing.preview)
            made += [(number // each, level, picture) for number, picture in done.items()]
            failed += broken
            if len(done) + broken < len(inputs) * each:
                break  # the disk is full
    if drawing.verbose:
        complain(f"{len(made)} of {pictures} in {time.perf_counter() - started:.1f} s")
    if drawing.grid is not None and made:
        _write_grid(drawing.grid, inputs, made, levels)
    if failed or len(made) < pictures:
        raise typer.Exit(SOME_FAILED if made else FAILED)


def _levels(field: str, given: str | None, *, has_grid: bool) -> tuple[float, ...]:
    if given is None:
        return _COMPARED if has_grid else ()
    try:
        levels = tuple(float(part) for part in given.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise BadInput(f"--strengths is {given!r}: give numbers from 0 to 1 with commas between")
    return levels


def _write_grid(
    path: Path,
    inputs: Sequence[Picture],
    made: Sequence[tuple[int, int, GeneratedImage]],
    levels: Sequence[float],
) -> None:
    """Write a row for each input: the picture itself, then its results by rising strength."""
    from PIL import Image

    from diptych.images import open_image

    panels: list[Image.Image] = []
    labels: list[str] = []
    rows = [[one for one in made if one[0] == place] for place in range(len(inputs))]
    width = 1 + max(len(row) for row in rows)
    for one, row in zip(inputs, rows, strict=True):
        if not row:
            continue
        source = open_image(one.source)
        source.thumbnail(row[0][2].image.size)
        panels.append(source)
        labels.append(Path(one.name).name)
        for _, level, picture in row:
            panels.append(picture.image)
            labels.append(f"{levels[level]:g}" if levels else f"seed {picture.seed}")
        missing = width - 1 - len(row)
        panels += [Image.new("RGB", (1, 1), "white")] * missing
        labels += [" "] * missing
    write_sheet(panels, path, columns=width, labels=labels)
    complain(f"grid: {path}")
