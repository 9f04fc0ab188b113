"""Turn any model into an artifact that runs without torch: find it, load it, export it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput, UnsupportedModel
from diptych.images import ImageInput, Preprocessing, preprocess
from diptych.inputs import at_home, is_file, is_folder, is_there
from diptych.runtimes.network import require_torch
from diptych.runtimes.storage import PRECISIONS
from diptych.weights import catalog
from diptych.weights.bounded_json import Rejected, read_object
from diptych.weights.diffusion import GeneratorFolder, resolve_generator
from diptych.weights.files import ModelFolder, describe
from diptych.weights.hub import resolve

if TYPE_CHECKING:
    from diptych.runtimes.export_generator import PictureJudge
    from diptych.runtimes.smaller_captioner import Judge

__all__ = ["PROFILES", "ExportRequest", "export", "export_model", "tasks_of"]

logger = logging.getLogger("diptych")

PROFILES = ("edge",)
_EDGE_BYTES = 100_000_000


def export(
    model: str | Path,
    folder: str | Path,
    *,
    task: str | None = None,
    quantize: str | None = None,
    profile: str | None = None,
    images: Sequence[ImageInput] | None = None,
    calibration: Sequence[ImageInput] | None = None,
    words: Sequence[str] | None = None,
    revision: str | None = None,
    force: bool = False,
    measure: bool = True,
    judge: Judge | None = None,
    picture_judge: PictureJudge | None = None,
) -> dict[str, Any]:
    """Write a model as ONNX graphs that run without torch, held against it; needs the export extra.

    `model` is a name, a folder or a single file. `task` "image-to-text" or "text-to-image" is told
    from the model where it is None; the name "default" means the captioner then. `quantize` stores
    weights smaller: None, "fp16", "int8" or "int4". `profile` "edge" makes a captioner as small as
    it goes: int4, the vocabulary cut to what captions use (or `words`), in all under 100 MB.
    `images` are pictures to compare captions on; with `calibration` int8 fixes the ranges of what
    goes into products: pictures for a captioner's encoder, prompts for a generator's UNet, which
    multiplies in float32 without. With `measure` the model and its export run in a process each,
    for size, memory and speed before and after; `judge` and `picture_judge` compare captioners and
    generators by what they are for (`diptych.evaluation.exported`). Returns the content of
    `export.json`. Raises `BadInput` for a folder that holds something, and `QualityLoss` where a
    smaller model falls under its bound, unless `force`.
    """
    found: ModelFolder | GeneratorFolder
    _check_task(task)
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
    request = ExportRequest(
        quantize=quantize,
        profile=profile,
        images=images,
        calibration=calibration,
        words=words,
        force=force,
        measure=measure,
        judge=judge,
        picture_judge=picture_judge,
    )
    return export_model(found, folder, request)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """Hold what `export` is asked for, beside the model and where it goes."""

    quantize: str | None = None
    profile: str | None = None
    images: Sequence[ImageInput] | None = None
    calibration: Sequence[ImageInput] | None = None
    words: Sequence[str] | None = None
    force: bool = False
    measure: bool = True
    judge: Judge | None = None
    picture_judge: PictureJudge | None = None


def export_model(
    model: ModelFolder | GeneratorFolder, folder: str | Path, request: ExportRequest
) -> dict[str, Any]:
    """Export what was already found; see `export`."""
    quantize, profile = request.quantize, request.profile
    if profile not in (None, *PROFILES):
        raise BadInput(f"profile is {profile!r}: give {' or '.join(PROFILES)}")
    if quantize not in (None, *PRECISIONS[1:]):
        choices = f"{', '.join(PRECISIONS[1:-1])} or {PRECISIONS[-1]}"
        raise BadInput(f"quantize is {quantize!r}: give {choices}")
    folder = at_home(folder)
    _check_target(folder, request.force)
    if isinstance(model, ModelFolder) and quantize and profile is None and not model.weights:
        report = _quantize_artifact(model, folder, quantize, request)
        if request.measure:
            _add_figures(report, model, Path(folder))
        return report
    require_torch("exporting a model", "export")
    if isinstance(model, GeneratorFolder):
        report = _export_generator(model, folder, request)
    else:
        report = _export_captioner(model, folder, request)
    if request.measure:
        _add_figures(report, model, Path(folder))
    return report


def _add_figures(
    report: dict[str, Any], model: ModelFolder | GeneratorFolder, folder: Path
) -> None:
    """Add what model and artifact cost, each in a fresh process, to the report and its file."""
    from diptych.runtimes.artifact import write_json
    from diptych.runtimes.figures import measure

    made = resolve_generator(folder) if isinstance(model, GeneratorFolder) else describe(folder)
    report["measured"] = {
        "before": measure(model, "torch" if model.weights else "onnxruntime"),
        "after": measure(made, "onnxruntime"),
    }
    beside = folder / ".export.json.partial"
    try:
        write_json(beside, report)
        beside.replace(folder / "export.json")
    except OSError as error:  # the model itself is there
        logger.warning("%s: its figures cannot be added (%s)", folder, error.strerror or error)


def _quantize_artifact(
    model: ModelFolder, folder: str | Path, quantize: str, request: ExportRequest
) -> dict[str, Any]:
    """Make an artifact that came without its checkpoint smaller; torch is not needed."""
    from diptych.runtimes.smaller_captioner import quantize_captioner

    preprocessing = Preprocessing.from_config(model.preprocessing)
    images, calibration = _pixels(preprocessing, request)
    return quantize_captioner(
        model.path,
        Path(folder),
        quantize,
        images=images,
        calibration=calibration,
        force=request.force,
        judge=request.judge,
    )


def _pixels(
    preprocessing: Preprocessing, request: ExportRequest
) -> tuple[list[Any] | None, list[Any] | None]:
    """Read the pictures to compare on, and those to calibrate on."""
    images, calibration = _listed(request.images), _listed(request.calibration)
    quantize = request.quantize
    if calibration is not None and (quantize != "int8" or not calibration):
        raise BadInput(
            f"calibration is for int8, and needs pictures: there are {len(calibration)}, and "
            f"quantize is {quantize!r}"
        )
    first, second = (
        None if several is None else [preprocess(image, preprocessing) for image in several]
        for several in (images, calibration)
    )
    return first, second


def _listed(images: Any) -> Any:
    """Return pictures as a list; somebody may have given one alone."""
    return [images] if isinstance(images, str | Path | Image.Image) else images


def _check_target(folder: Path, force: bool) -> None:
    """Raise `BadInput` for a folder that an artifact would be mixed into."""
    if is_file(folder):
        raise BadInput(f"{folder} is a file: give a folder to write to")
    if "\0" in str(folder):
        raise BadInput(f"{str(folder)!r} cannot be the name of a folder")
    if force or not is_folder(folder):
        return
    names = sorted(path.name for path in folder.iterdir())
    if names:
        raise BadInput(
            f"{folder} is not empty, it holds {', '.join(names[:3])}: give a new folder, or force "
            "it to replace files in this one"
        )


def _export_captioner(
    model: ModelFolder, folder: str | Path, request: ExportRequest
) -> dict[str, Any]:
    from diptych.runtimes.export import Belongings, export_captioner
    from diptych.runtimes.smaller_captioner import Shrinking
    from diptych.runtimes.vocabulary import caption_words
    from diptych.weights.load import load_captioner

    preprocessing = Preprocessing.from_config(model.preprocessing)
    images, calibration = _pixels(preprocessing, request)
    quantize, words, most_bytes = request.quantize, request.words, None
    if request.profile == "edge":
        quantize, words = quantize or "int4", words or caption_words()
        most_bytes = _EDGE_BYTES
    wanted = Shrinking(
        mode=quantize,
        images=images,
        calibration=calibration,
        most_bytes=most_bytes,
        force=request.force,
        judge=request.judge,
    )
    source = {"name": model.name, "revision": model.revision}
    belongings = Belongings(preprocessing.to_config(), model.generation, model.tokenizer, source)
    return export_captioner(load_captioner(model), Path(folder), belongings, wanted, words=words)


def _export_generator(
    model: GeneratorFolder, folder: str | Path, request: ExportRequest
) -> dict[str, Any]:
    from diptych.runtimes.export_generator import export_generator
    from diptych.weights.load_generator import load_generator

    if any(each is not None for each in (request.images, request.words, request.profile)):
        raise BadInput(f"{model.name} draws pictures: leave images, words and profile out")
    prompts, calibration = request.calibration, None
    if prompts is not None:
        calibration = _token_ids(model, prompts, request.quantize)
    return export_generator(
        load_generator(model, device="cpu", dtype="float32"),
        model,
        folder,
        precision=request.quantize or PRECISIONS[0],
        calibration=calibration,
        force=request.force,
        judge=request.picture_judge,
    )


def _token_ids(
    model: GeneratorFolder, prompts: Sequence[Any], quantize: str | None
) -> dict[str, NDArray[np.int64]]:
    """Return the ids of `prompts` and of the empty one, [B + 1, T] by text encoder."""
    are_texts = not isinstance(prompts, str) and all(isinstance(each, str) for each in prompts)
    if quantize != "int8" or not prompts or not are_texts:
        raise BadInput(
            f"calibration of {model.name}, which draws pictures, is for int8 and needs a list of "
            f"prompts: it is {str(prompts)[:60]!r}, and quantize is {quantize!r}"
        )
    found = {}
    for name, files in model.tokenizers.items():
        tokenizer = files.open()
        ids = [tokenizer.encode(prompt) for prompt in (*prompts, "")]
        found[name.replace("tokenizer", "text_encoder")] = np.array(ids, np.int64)
    return found


def tasks_of(model: str | Path, task: str | None = None) -> tuple[str, ...]:
    """Tell what a model is for; both tasks for "default". `task` decides where it is given."""
    _check_task(task)
    if task is None and str(model) == catalog.DEFAULT:
        return (catalog.CAPTIONS, catalog.PICTURES)
    return (task or _task_of(model) or catalog.CAPTIONS,)


def _check_task(task: str | None) -> None:
    if task is not None and task not in catalog.TASKS:
        raise BadInput(f"task is {task!r}: give {' or '.join(catalog.TASKS)}")


def _task_of(model: str | Path) -> str | None:
    """Tell what a model is for from its place or name; None for what has to be fetched first."""
    own = {catalog.DEFAULT: catalog.CAPTIONS, catalog.TURBO: catalog.PICTURES}
    if str(model) in own:
        return own[str(model)]
    path = at_home(model)
    if is_there(path):
        return _task_of_path(path)
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
