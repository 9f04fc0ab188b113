"""List the models that diptych knows of: embedded, in the hub's cache, or published.

The table holds captioners whose layout is read by `dialects`. A pinned revision is fetched
whatever happens to the repository afterwards; the others are resolved once, when fetched.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.errors import DiptychError
from diptych.weights.files import ModelFolder, describe

__all__ = [
    "DEFAULT",
    "EMBEDDED",
    "KNOWN",
    "KnownModel",
    "ModelInfo",
    "available_models",
    "cache_folder",
    "complete",
    "known_model",
    "names",
    "repository_folder",
]

DEFAULT = "default"
EMBEDDED = Path(__file__).resolve().parent / "embedded" / "captioner"

_TASK = "image-to-text"
_HUB = "https://huggingface.co/"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*['\"]?([A-Za-z0-9.+-]{1,40})", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """Describe a published model: what it is called, what it weighs, whose it is."""

    id: str
    aliases: tuple[str, ...]
    revision: str | None  # the commit that is fetched; None for what `main` is at the time
    size: int  # bytes to fetch, as far as known
    licence: str
    task: str = _TASK

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
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Describe a model that `Captioner.load(name)` takes."""

    name: str
    state: Literal["embedded", "cached", "known"]
    size: int  # bytes on disk, or to fetch
    licence: str
    source: str
    task: str
    revision: str | None
    path: Path | None  # None until it is fetched


def available_models() -> list[ModelInfo]:
    """List what is embedded, then what is in the hub's cache, then what else is known."""
    cached = sorted(_cached(), key=lambda info: info.name.lower())
    there = {info.name for info in cached}
    known = [
        ModelInfo(m.id, "known", m.size, m.licence, m.source, m.task, m.revision, None)
        for m in KNOWN
        if m.id not in there
    ]
    return [*_embedded(), *cached, *known]


def known_model(name: str) -> KnownModel | None:
    """Return the known model that `name`, an id or an alias, means."""
    return next((m for m in KNOWN if name == m.id or name in m.aliases), None)


def names() -> list[str]:
    """Return every name that means a known model."""
    return [DEFAULT, *(name for m in KNOWN for name in (m.id, *m.aliases))]


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


def complete(snapshot: Path, name: str | None = None) -> ModelFolder | None:
    """Describe a snapshot of the hub's cache; None where it is no captioner, or only part of one.

    A fetch that was interrupted leaves such parts behind.
    """
    try:
        model = describe(snapshot, name, snapshot.name)
    except (DiptychError, OSError):
        return None
    return model if model.weights or model.networks else None


def _embedded() -> Iterator[ModelInfo]:
    if EMBEDDED.is_dir():
        yield ModelInfo(
            name=DEFAULT,
            state="embedded",
            size=_size(EMBEDDED),
            licence="apache-2.0, trained on research-only photos",
            source="recipes/default_captioner",
            task=_TASK,
            revision=None,
            path=EMBEDDED,
        )


def _cached() -> Iterator[ModelInfo]:
    try:
        repositories = sorted(cache_folder().glob("models--*--*"))
    except OSError:
        return
    for repository in repositories:
        model_id = "/".join(repository.name.split("--")[1:])
        if (snapshot := _snapshot(repository, model_id)) is not None:
            known = known_model(model_id)
            yield ModelInfo(
                name=model_id,
                state="cached",
                size=_size(snapshot),
                licence=_licence(snapshot) or (known.licence if known else "not stated"),
                source=_HUB + model_id,
                task=_TASK,
                revision=snapshot.name,
                path=snapshot,
            )


def _snapshot(repository: Path, model_id: str) -> Path | None:
    """Return the snapshot that loading `model_id` would take, or else one that is there."""
    known = known_model(model_id)
    wanted = [known.revision] if known and known.revision else []
    with contextlib.suppress(OSError, ValueError):
        wanted += [(repository / "refs" / "main").read_text("utf-8").strip()]
    others = sorted(path.name for path in (repository / "snapshots").glob("*"))
    for commit in [*wanted, *others]:
        snapshot = repository / "snapshots" / commit
        if _COMMIT.fullmatch(commit) and complete(snapshot):
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
