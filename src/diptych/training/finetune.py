"""Fine-tune a model on one's own pictures: what both panels do alike around the loop."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diptych import __version__
from diptych.errors import BadInput
from diptych.inputs import at_home
from diptych.runtimes.on_torch import best_device
from diptych.training.cache import file_mark
from diptych.training.checkpoints import Checkpoints, locked, write_whole
from diptych.training.data import Advance, Dataset, prepare, write_captions
from diptych.training.loop import Finished, fit
from diptych.training.memory import bound_kernel_cache
from diptych.training.options import CaptionerTrainOptions, GeneratorTrainOptions, TrainOptions
from diptych.training.parallel import Workers
from diptych.training.task import Task
from diptych.training.workplace import Workplace
from diptych.weights.load_module import as_device

__all__ = ["Reporting", "finetune_captioner", "finetune_generator", "read_data"]

logger = logging.getLogger("diptych")


@dataclass(frozen=True, slots=True)
class Reporting:
    """Hold who is told: of rows of metrics, of what is going on, and of pictures being read."""

    tell: Callable[[dict[str, Any]], None] | None = None
    note: Callable[[str], None] = logger.info
    advance: Callable[[int], Advance] | None = field(default=None)


def _lasting(reporting: Reporting) -> Reporting:
    """Return one that goes on in silence where those who are told have left: `… 2>&1 | head`."""
    tell, advance = reporting.tell, reporting.advance
    return Reporting(
        tell=None if tell is None else _silenced(tell),
        note=_silenced(reporting.note),
        advance=None if advance is None else lambda total: _silenced(advance(total)),
    )


def _silenced(tell: Callable[..., None]) -> Callable[..., None]:
    def told(*words: Any) -> None:
        with suppress(BrokenPipeError):
            tell(*words)

    return told


def finetune_generator(
    data: str | Path,
    output: str | Path,
    model: str | Path = "default",
    options: GeneratorTrainOptions | None = None,
    *,
    device: str = "auto",
    revision: str | None = None,
    resume: bool = False,
    caption_with: str | None = None,
    reporting: Reporting | None = None,
    **overrides: Any,
) -> Finished:
    """Train a generator on the pictures of `data`, and write what it learned to `output`.

    `overrides` are words of `GeneratorTrainOptions` and win over `options`. A LoRA is written as
    `pytorch_lora_weights.safetensors`, a word as `learned_embeds.safetensors`, all weights as the
    folder `model`. With `resume` a run goes on from its last checkpoint, and begins where there is
    none. `caption_with` names a captioner for pictures without captions. Raises `BadInput` for
    data or options that cannot be used, `Stopped` (a KeyboardInterrupt) when told to stop.
    """
    from diptych.training.generator import GeneratorTask
    from diptych.training.methods import generator_defaults
    from diptych.weights.diffusion import resolve_generator
    from diptych.weights.load_generator import load_generator

    asked = (options or GeneratorTrainOptions()).replace(**overrides)
    described = resolve_generator(str(model), revision=revision)
    resolved = asked.resolve(generator_defaults(asked, described))
    with _run(Path(output), model, data, resolved, device, resume, reporting) as run:
        dataset = run.read(data, caption_with)
        place = run.place_for(dataset, described.name, described.weights)
        modules = load_generator(described, device=place.device, dtype="float32", check_finite=True)
        return run.fit(GeneratorTask(described, modules, dataset, resolved, place))


def finetune_captioner(
    data: str | Path,
    output: str | Path,
    model: str | Path = "default",
    options: CaptionerTrainOptions | None = None,
    *,
    encoder: str | Path | None = None,
    decoder: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    resume: bool = False,
    reporting: Reporting | None = None,
    **overrides: Any,
) -> Finished:
    """Train a captioner on the captioned pictures of `data`, and write it to `output`/model.

    `overrides` are words of `CaptionerTrainOptions`. `encoder` and `decoder`, a ViT and a GPT-2,
    make a new captioner instead of `model`. With `resume` a run goes on from its last checkpoint.
    Raises as `finetune_generator` does.
    """
    from diptych.training.captioner import CaptionerTask, captioner_defaults, open_captioner

    asked = (options or CaptionerTrainOptions()).replace(**overrides)
    if (encoder is None) != (decoder is None):
        raise BadInput("a new captioner wants both encoder and decoder: a ViT and a GPT-2")
    resolved = asked.resolve(captioner_defaults(asked, is_new=encoder is not None))
    name = model if encoder is None else f"{encoder} + {decoder}"
    with _run(Path(output), name, data, resolved, device, resume, reporting) as run:
        dataset = run.read(data, None)
        opened = open_captioner(
            str(model),
            None if encoder is None or decoder is None else (str(encoder), str(decoder)),
            resolved,
            device=run.device,
            revision=revision,
        )
        place = run.place_for(dataset, str(name), {"": opened.files})
        return run.fit(CaptionerTask(opened, dataset, resolved, place))


def read_data(
    data: str | Path,
    options: TrainOptions,
    *,
    captions: Path | None = None,
    caption_with: str | None = None,
    reporting: Reporting | None = None,
) -> Dataset:
    """Read and check the pictures that a run with `options` would train on.

    `captions` is where those that `caption_with` writes are kept.
    """
    method = getattr(options, "method", "")
    fraction = options.validation_fraction
    if fraction is None and method in ("dreambooth", "textual-inversion"):
        fraction = 0.0
    caption_all = None
    if caption_with is not None:
        assert captions is not None, "captions are kept somewhere"
        caption_all = write_captions(captions, caption_with)
    return prepare(
        data,
        validation_fraction=fraction,
        image_column=options.image_column,
        caption_column=options.caption_column,
        caption_all=caption_all,
        needs_captions=method not in ("dreambooth", "textual-inversion"),
        advance=None if reporting is None else reporting.advance,
    )


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """Hold the folder of a run, and the processes and the device that do it."""

    folder: Path
    options: TrainOptions
    device: torch.device
    workers: Workers
    resume: bool
    reporting: Reporting
    document: Mapping[str, Any]

    def note(self) -> None:
        """Write down what is done in the folder."""
        if self.workers.leads:
            write_whole(self.folder / "run.json", json.dumps(self.document, indent=2) + "\n")

    def place_for(
        self, dataset: Dataset, name: str, weights: Mapping[str, Sequence[Path]]
    ) -> Workplace:
        """Return where the task works; `weights` are the files that it begins with."""
        fingerprint = _fingerprint(dataset, name, weights)
        return Workplace(self.folder, self.device, self.workers, fingerprint, self.reporting.note)

    def read(self, data: str | Path, caption_with: str | None) -> Dataset:
        """Read the data; the first process alone writes captions, the others read them."""
        captions = self.folder / "captions.jsonl"
        if not self.workers.leads:
            self.workers.wait()
        dataset = read_data(
            data,
            self.options,
            captions=captions,
            caption_with=caption_with,
            reporting=self.reporting if self.workers.leads else None,
        )
        self._check_pictures(dataset)
        if self.workers.leads:
            report = json.dumps(dataset.report.as_dict(), indent=2, ensure_ascii=False)
            write_whole(self.folder / "dataset.json", report + "\n")
            self.reporting.note(dataset.report.as_text())
            self.workers.wait()
        return dataset

    def _check_pictures(self, dataset: Dataset) -> None:
        """Raise `BadInput` where a run goes on with other pictures than it began with."""
        path = self.folder / "pictures.json"
        now = {e.digest: e.name for e in (*dataset.train, *dataset.validation)}
        is_going_on = Checkpoints(self.folder / "checkpoints").newest_step() is not None
        if not is_going_on or not path.is_file():
            if self.workers.leads:
                write_whole(path, json.dumps(now, indent=0, ensure_ascii=False) + "\n")
            return
        before: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        gone = [name for digest, name in before.items() if digest not in now]
        new = [name for digest, name in now.items() if digest not in before]
        if gone or new:
            told = [f"{names[0]} is {what}" for names, what in ((gone, "gone"), (new, "new"))
                    if names]  # fmt: skip
            raise BadInput(
                f"{self.folder}: the run began with other pictures ({len(gone)} of them gone or "
                f"changed, {len(new)} new): {', '.join(told)}; put them back, or begin anew in "
                "another folder"
            )

    def fit(self, task: Task) -> Finished:
        finished = fit(task, self.options, resume=self.resume, tell=self.reporting.tell)
        self.note()
        return finished


@contextmanager
def _run(
    folder: Path,
    model: str | Path,
    data: str | Path,
    options: TrainOptions,
    device: str,
    resume: bool,
    reporting: Reporting | None,
) -> Iterator[_Run]:
    """Enter the folder of a run, alone; leave a note of what is done there."""
    bound_kernel_cache()
    folder = at_home(folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file: give a folder to write to")
    if Path(data).is_dir() and folder.resolve().is_relative_to(Path(data).resolve()):
        raise BadInput(
            f"{folder}: lies within the data, where its samples would be taken for pictures to "
            "learn: give a folder beside it"
        )
    workers = Workers()
    try:
        with locked(folder) if workers.leads else nullcontext():
            if workers.leads:
                _tidy(folder)
            step = Checkpoints(folder / "checkpoints").newest_step()
            if step is not None and not resume:
                raise BadInput(
                    f"{folder}: holds a run that is at step {step}: resume it, or give another "
                    "folder"
                )
            document = {
                "diptych": __version__,
                "torch": torch.__version__,
                "model": str(model),
                "data": str(data),
                "options": options.as_dict(),
            }
            place = folder, options, as_device(_device(device)), workers
            run = _Run(*place, resume, _lasting(reporting or Reporting()), document)
            if step is None:  # a run that goes on may yet be refused
                run.note()
            yield run
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be written ({error.strerror or error}): make room and resume, or "
            "give another folder"
        ) from error
    finally:
        workers.close()


def _tidy(folder: Path) -> None:
    """Remove what a kill of a run left half-written; nobody else is at work here.

    By names that only a run gives, in the places where it writes: other files may lie there too.
    """
    if not (folder / "run.json").is_file():
        return
    whole = rf"\.(model|{re.escape(folder.name)})\.[0-9a-f]{{8}}\.partial"
    small = r"\.((run|dataset|pictures)\.json|metrics\.jsonl|report\.html)\.partial"
    places = {
        folder: rf"{whole}|{small}",
        folder / "model": whole,  # which is written beside its own older files
        folder / "checkpoints": r"\.step-\d+\.([0-9a-f]{8}\.partial|old)",
    }
    for place, names in places.items():
        for path in place.iterdir() if place.is_dir() else ():
            if not re.fullmatch(names, path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in (folder / "cache").rglob(".*.safetensors.*"):
        named = re.fullmatch(r"\.[0-9a-f]+\.safetensors\.(\d+)\.[0-9a-f]{6}", path.name)
        # Another process of this run may be ahead of this one, and write.
        if named and not _is_alive(int(named[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where asking would be an interruption
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is of somebody else
        pass
    return True


def _device(device: str) -> str:
    device = best_device() if device == "auto" else device
    # What torchrun and `accelerate launch` number the processes of a machine by.
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def _fingerprint(dataset: Dataset, name: str, weights: Mapping[str, Sequence[Path]]) -> str:
    """Return what tells this run's data and beginning from others."""
    marks = sorted([path.name, file_mark(path)] for paths in weights.values() for path in paths)
    text = json.dumps([dataset.fingerprint, name, marks])
    return hashlib.sha256(text.encode()).hexdigest()
