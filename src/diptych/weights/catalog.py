"""List the models that diptych knows of: embedded, in the hub's cache, or published.

The table holds models whose layout is read by `dialects`. A pinned revision is fetched whatever
happens to the repository afterwards; the others are resolved once, when fetched.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.errors import DiptychError
from diptych.weights.files import describe
from diptych.weights.generator_files import GeneratorEdition, describe_generator

__all__ = [
    "CAPTIONS",
    "DEFAULT",
    "EMBEDDED",
    "EMBEDDED_GENERATOR",
    "KNOWN",
    "PICTURES",
    "TURBO",
    "KnownModel",
    "ModelInfo",
    "available_models",
    "cache_folder",
    "embedded_folder",
    "is_complete",
    "known_model",
    "names",
    "other_task",
    "repository_folder",
]

DEFAULT = "default"
TURBO = "default-turbo"  # the default generator's edition for few steps
EMBEDDED = Path(__file__).resolve().parent / "embedded" / "captioner"
EMBEDDED_GENERATOR = EMBEDDED.with_name("generator")

CAPTIONS, PICTURES = "image-to-text", "text-to-image"
TASKS = (CAPTIONS, PICTURES)

_HUB = "https://huggingface.co/"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*['\"]?([A-Za-z0-9.+-]{1,40})", re.MULTILINE)


# Distilled to a few steps without guidance.
_TURBO = {"num_inference_steps": 4, "guidance_scale": 1.0, "timestep_spacing": "trailing"}


@dataclass(frozen=True, slots=True)
class KnownModel:
    """Describe a published model: what it is called, what it weighs, whose it is."""

    id: str
    aliases: tuple[str, ...]
    revision: str | None  # the commit that is fetched; None for what `main` is at the time
    size: int  # bytes to fetch, as far as known
    licence: str
    task: str = CAPTIONS
    defaults: Mapping[str, Any] = field(default_factory=dict)  # that its files do not tell

    @property
    def source(self) -> str:
        return _HUB + self.id


KNOWN = (
    KnownModel(
        id="nlpconnect/vit-gpt2-image-captioning",
        aliases=("vit-gpt2", "vit-gpt2-image-captioning"),
        revision="dc68f91c06a1ba6f15268e5b9c13ae7a7c514084",
        size=982_000_000,
        licence="apache-2.0",
    ),
    KnownModel(
        id="ydshieh/vit-gpt2-coco-en",
        aliases=("vit-gpt2-coco-en",),
        revision=None,
        size=982_000_000,
        licence="not stated",
    ),
    KnownModel(
        id="Mozilla/distilvit",
        aliases=("distilvit",),
        revision=None,
        size=730_000_000,
        licence="apache-2.0",
    ),
    KnownModel(
        id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        aliases=("sd-1.5", "stable-diffusion-v1-5"),
        revision=None,
        size=4_270_000_000,
        licence="creativeml-openrail-m",
        task=PICTURES,
    ),
    KnownModel(
        id="stable-diffusion-v1-5/stable-diffusion-inpainting",
        aliases=("sd-1.5-inpainting", "stable-diffusion-inpainting"),
        revision=None,
        size=4_270_000_000,
        licence="creativeml-openrail-m",
        task=PICTURES,
    ),
    KnownModel(
        id="stabilityai/stable-diffusion-2-1",
        aliases=("sd-2.1", "stable-diffusion-2-1"),
        revision=None,
        size=5_160_000_000,
        licence="openrail++",
        task=PICTURES,
    ),
    KnownModel(
        id="stabilityai/stable-diffusion-2-1-base",
        aliases=("sd-2.1-base", "stable-diffusion-2-1-base"),
        revision=None,
        size=5_160_000_000,
        licence="openrail++",
        task=PICTURES,
    ),
    KnownModel(
        id="stabilityai/stable-diffusion-xl-base-1.0",
        aliases=("sdxl", "sdxl-base", "stable-diffusion-xl-base-1.0"),
        revision=None,
        size=13_880_000_000,
        licence="openrail++",
        task=PICTURES,
    ),
    KnownModel(
        id="stabilityai/sd-turbo",
        aliases=("sd-turbo",),
        revision=None,
        size=5_160_000_000,
        licence="not stated here, see the source",
        task=PICTURES,
        defaults=_TURBO,
    ),
    KnownModel(
        id="stabilityai/sdxl-turbo",
        aliases=("sdxl-turbo",),
        revision=None,
        size=13_880_000_000,
        licence="not stated here, see the source",
        task=PICTURES,
        defaults=_TURBO,
    ),
    KnownModel(
        id="SimianLuo/LCM_Dreamshaper_v7",
        aliases=("lcm-dreamshaper-v7",),
        revision=None,
        size=4_270_000_000,
        licence="mit, after creativeml-openrail-m",
        task=PICTURES,
    ),
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Describe a model that `Captioner.load(name)` or `ImageGenerator.load(name)` takes."""

    name: str
    state: Literal["embedded", "cached", "known"]
    size: int  # bytes on disk, or to fetch
    licence: str
    source: str
    task: str
    revision: str | None
    path: Path | None  # None until it is fetched

    @property
    def short(self) -> str:
        """Return the shortest name that means the model."""
        known = known_model(self.name, self.task)
        return min((self.name, *(known.aliases if known else ())), key=len)


def available_models(task: str | None = None) -> list[ModelInfo]:
    """List what is embedded, then what is in the hub's cache, then what else is known.

    With `task`, "image-to-text" or "text-to-image", only the models for it.
    """
    tasks = TASKS if task is None else (task,)
    cached = sorted(_cached(tasks), key=lambda info: info.name.lower())
    there = {info.name for info in cached}
    known = [
        ModelInfo(m.id, "known", m.size, m.licence, m.source, m.task, m.revision, None)
        for m in KNOWN
        if m.id not in there and m.task in tasks
    ]
    return [*_embedded(tasks), *cached, *known]


def known_model(name: str, task: str | None = None) -> KnownModel | None:
    """Return the known model that `name`, an id or an alias, means."""
    known = [m for m in KNOWN if task in (None, m.task)]
    return next((m for m in known if name == m.id or name in m.aliases), None)


def names(task: str | None = None) -> list[str]:
    """Return every name that means a known model."""
    known = [m for m in KNOWN if task in (None, m.task)]
    turbo = [TURBO] if task != CAPTIONS and _turbo() else []
    return [DEFAULT, *turbo, *(name for m in known for name in (m.id, *m.aliases))]


def other_task(name: str, task: str) -> str | None:
    """Say what a known model does, and where it belongs, if that is not `task`."""
    known = known_model(name)
    of = PICTURES if name == TURBO else None if known is None else known.task
    if of is None or of == task:
        return None
    does = {
        CAPTIONS: "writes captions: use it with `diptych caption`, or Captioner",
        PICTURES: "draws pictures: use it with `diptych generate`, or ImageGenerator",
    }
    return does[of]


def embedded_folder(task: str) -> Path:
    """Return where the default model for a task is, in an install that carries one."""
    return EMBEDDED if task == CAPTIONS else EMBEDDED_GENERATOR


def cache_folder() -> Path:
    """Return the folder in which huggingface_hub keeps what it fetches, as its settings say."""
    environ = os.environ
    home = environ.get("HF_HOME") or os.path.join(  # noqa: PTH118
        environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    hub = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(hub)).expanduser()


def repository_folder(model_id: str) -> Path:
    """Return the folder of one repository in the hub's cache."""
    return cache_folder() / f"models--{model_id.replace('/', '--')}"


def is_complete(snapshot: Path, task: str) -> bool:
    """Tell whether a snapshot of the hub's cache is a model for `task`, and all of it.

    A fetch that was interrupted leaves parts behind.
    """
    try:
        model = (describe if task == CAPTIONS else describe_generator)(snapshot)
    except (DiptychError, OSError):
        return False
    return bool(model.weights or model.networks)


_LICENCES = {
    CAPTIONS: "apache-2.0, trained on research-only photos",
    PICTURES: "apache-2.0, trained on Apache-2.0, CC BY and own pictures",
}
_RECIPES = {CAPTIONS: "recipes/default_captioner", PICTURES: "recipes/default_generator"}


def _embedded(tasks: tuple[str, ...]) -> Iterator[ModelInfo]:
    for task in tasks:
        folder = embedded_folder(task)
        if folder.is_dir():
            yield ModelInfo(
                name=DEFAULT,
                state="embedded",
                size=_size(folder),
                licence=_LICENCES[task],
                source=_RECIPES[task],
                task=task,
                revision=None,
                path=folder,
            )
    if PICTURES in tasks and (turbo := _turbo()):
        yield ModelInfo(
            name=TURBO,
            state="embedded",
            size=sum(path.stat().st_size for path in (turbo.lora, *turbo.networks.values())),
            licence=_LICENCES[PICTURES],
            source=_RECIPES[PICTURES],
            task=PICTURES,
            revision=None,
            path=EMBEDDED_GENERATOR,
        )


def _turbo() -> GeneratorEdition | None:
    """Return what the default generator has beside its own files; None where it has nothing."""
    try:
        return describe_generator(EMBEDDED_GENERATOR).editions.get("turbo")
    except (DiptychError, OSError):
        return None


def _cached(tasks: tuple[str, ...]) -> Iterator[ModelInfo]:
    try:
        repositories = sorted(cache_folder().glob("models--*--*"))
    except OSError:
        return
    for repository in repositories:
        model_id = "/".join(repository.name.split("--")[1:])
        known = known_model(model_id)
        for task in tasks:
            if (snapshot := _snapshot(repository, model_id, task)) is not None:
                yield ModelInfo(
                    name=model_id,
                    state="cached",
                    size=_size(snapshot),
                    licence=_licence(snapshot) or (known.licence if known else "not stated"),
                    source=_HUB + model_id,
                    task=task,
                    revision=snapshot.name,
                    path=snapshot,
                )


def _snapshot(repository: Path, model_id: str, task: str) -> Path | None:
    """Return the snapshot that loading `model_id` would take, or else one that is there."""
    known = known_model(model_id)
    wanted = [known.revision] if known and known.revision else []
    with contextlib.suppress(OSError, ValueError):
        wanted += [(repository / "refs" / "main").read_text("utf-8").strip()]
    others = sorted(path.name for path in (repository / "snapshots").glob("*"))
    for commit in [*wanted, *others]:
        snapshot = repository / "snapshots" / commit
        if _COMMIT.fullmatch(commit) and is_complete(snapshot, task):
            return snapshot
    return None


def _size(folder: Path) -> int:
    """Add up the files below `folder`; the links of a snapshot count as what they point to."""
    files = {path.resolve() for path in folder.rglob("*") if path.is_file()}
    return sum(path.stat().st_size for path in files)


def _licence(snapshot: Path) -> str | None:
    try:
        with (snapshot / "README.md").open("rb") as file:
            head = file.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return None
    found = _LICENCE.search(head.split("\n---", 1)[0]) if head.startswith("---") else None
    return found[1] if found else None
