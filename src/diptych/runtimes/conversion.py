"""Turn any model into an artifact that runs without torch: find it, load it, export it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.errors import BadInput, UnsupportedModel
from diptych.images import ImageInput, Preprocessing, preprocess
from diptych.runtimes.network import require_torch
from diptych.runtimes.storage import PRECISIONS
from diptych.weights import catalog
from diptych.weights.bounded_json import Rejected, read_object
from diptych.weights.diffusion import GeneratorFolder, resolve_generator
from diptych.weights.files import ModelFolder
from diptych.weights.hub import resolve

__all__ = ["export", "export_model"]


def export(
    model: str | Path,
    folder: str | Path,
    *,
    task: str | None = None,
    quantize: str | None = None,
    images: Sequence[ImageInput] | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write a model as ONNX graphs that run without torch, held against it; needs the export extra.

    `model` is a name, a folder or a single file. `task` "image-to-text" or "text-to-image" is told
    from the model where it is None; the name "default" means the captioner then. `quantize` stores
    weights smaller: None, "int8", for a generator also "fp16". `images` are pictures to compare
    captions on. Returns the content of `export.json`.
    """
    found: ModelFolder | GeneratorFolder
    if task is not None and task not in catalog.TASKS:
        raise BadInput(f"task is {task!r}: give {' or '.join(catalog.TASKS)}")
    chosen = task or _task_of(model)
    if chosen == catalog.PICTURES:
        found = resolve_generator(model, revision=revision)
    else:
        try:
            found = resolve(model, revision=revision)
        except UnsupportedModel as error:
            if task is not None or chosen is not None:
                raise
            try:  # a repository of the hub that nothing is known of
                found = resolve_generator(model, revision=revision)
            except UnsupportedModel:
                raise error from None
    return export_model(found, folder, quantize=quantize, images=images)


def export_model(
    model: ModelFolder | GeneratorFolder,
    folder: str | Path,
    *,
    quantize: str | None = None,
    images: Sequence[ImageInput] | None = None,
) -> dict[str, Any]:
    """Export what was already found; see `export`."""
    require_torch("exporting a model", "export")
    if isinstance(model, GeneratorFolder):
        if images is not None:
            raise BadInput(f"{model.name} draws pictures: leave images out")
        return _export_generator(model, folder, quantize)
    return _export_captioner(model, folder, quantize, images)


def _export_captioner(
    model: ModelFolder,
    folder: str | Path,
    quantize: str | None,
    images: Sequence[ImageInput] | None,
) -> dict[str, Any]:
    from diptych.runtimes.export import export_captioner
    from diptych.weights.load import load_captioner

    preprocessing = Preprocessing.from_config(model.preprocessing)
    pixels = None
    if images is not None:
        pixels = [preprocess(image, preprocessing) for image in images]
    return export_captioner(
        load_captioner(model),
        Path(folder),
        preprocessing=preprocessing.to_config(),
        generation=model.generation,
        tokenizer=model.tokenizer,
        source={"name": model.name, "revision": model.revision},
        images=pixels,
        quantize=quantize,
    )


def _export_generator(
    model: GeneratorFolder, folder: str | Path, quantize: str | None
) -> dict[str, Any]:
    from diptych.runtimes.export_generator import export_generator
    from diptych.weights.load_generator import load_generator

    if quantize not in (None, *PRECISIONS[1:]):
        raise BadInput(f"quantize is {quantize!r}: give {' or '.join(PRECISIONS[1:])}")
    modules = load_generator(model, device="cpu", dtype="float32")
    return export_generator(modules, model, folder, precision=quantize or PRECISIONS[0])


def _task_of(model: str | Path) -> str | None:
    """Tell what a model is for from its place or name; None for what has to be fetched first."""
    path = Path(model).expanduser()
    if str(model) != catalog.DEFAULT and path.exists():
        return _task_of_path(path)
    if str(model) == catalog.DEFAULT:
        return catalog.CAPTIONS
    known = catalog.known_model(str(model))
    return None if known is None else known.task


def _task_of_path(path: Path) -> str:
    if path.is_file():
        return catalog.PICTURES
    if (path / "artifact.json").is_file():
        try:
            stated = read_object(path / "artifact.json").get("task")
        except (OSError, Rejected):
            stated = None  # said better by those who read the rest
        return catalog.PICTURES if stated == catalog.PICTURES else catalog.CAPTIONS
    marks = ("model_index.json", "unet/config.json")
    found = any((path / mark).is_file() for mark in marks)
    return catalog.PICTURES if found else catalog.CAPTIONS
