"""Find the folder that a name means: embedded, on this disk, in the hub's cache, or on the hub.

What is cached is used without asking anybody, so it is the same tomorrow and works offline. The
network is for what is not cached, and for a branch or tag that is asked for by name.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from diptych.errors import BadInput, UnknownModel, UnsupportedModel
from diptych.inputs import at_home, is_file, is_there
from diptych.weights import catalog
from diptych.weights.files import ModelFolder, describe
from diptych.weights.generator_files import GeneratorFolder

__all__ = ["Kind", "resolve", "resolve_file", "resolve_kind"]

logger = logging.getLogger("diptych")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_FILE = re.compile(_MODEL_ID.pattern + r"/[A-Za-z0-9_][A-Za-z0-9_./-]{0,255}")
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")

_BESIDE = frozenset(
    {
        "README.md",  # names the licence
        "added_tokens.json",
        "artifact.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
)
# Of which a captioner has one, mostly.
_OF_PICTURES = ("preprocessor_config.json", "processor_config.json")
# In order of preference: pickles only where there is nothing else.
_WEIGHTS = (
    re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"),
    re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"),
)
_NETWORKS = re.compile(r"[A-Za-z0-9_-]+\.onnx(\.data)?")  # the graph, and its weights


Found = TypeVar("Found", ModelFolder, GeneratorFolder)


@dataclass(frozen=True, slots=True)
class Kind(Generic[Found]):
    """Say what is looked for: how it is described, and which files of a repository it needs."""

    task: str
    describe: Callable[[Path, str, str | None], Found]
    needed: Callable[[Sequence[str], str], list[str]]
    places: str  # what may be given instead of a name


def resolve(
    name_or_path: str | os.PathLike[str], revision: str | None = None, *, progress: bool = False
) -> ModelFolder:
    """Return the captioner that a name or path means, fetched if need be.

    `default` is the embedded model, then come folders, aliases of the catalog, and ids of the hub
    (`owner/name`). `revision` is a commit, tag or branch of the hub; without one, the commit that
    the catalog pins, or what is cached. `progress` draws bars on stderr while fetching.
    Raises `UnknownModel` where the name leads nowhere, `BadInput` for a revision that cannot be.
    """
    kind = Kind(catalog.CAPTIONS, describe, _needed, "a folder")
    return resolve_kind(kind, name_or_path, revision, progress=progress)


def resolve_kind(
    kind: Kind[Found],
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    progress: bool = False,
) -> Found:
    """Return the model of a kind that a name or path means, as `resolve` does for captioners."""
    name = os.fspath(name_or_path)
    if name == catalog.DEFAULT:
        _refuse_revision(name, revision)
        folder = catalog.embedded_folder(kind.task)
        if not folder.is_dir():
            raise UnknownModel(_no_default(kind))
        return kind.describe(folder, name, None)
    path = at_home(name)
    if name and is_there(path):
        _refuse_revision(name, revision)
        return kind.describe(path, name, None)
    known = catalog.known_model(name, kind.task)
    if known is None and (told := catalog.other_task(name, kind.task)) is not None:
        raise UnknownModel(f"{name} {told}")
    model_id = known.id if known else name
    if not _MODEL_ID.fullmatch(model_id) or isinstance(name_or_path, Path):
        raise UnknownModel(f"{name!r} is no folder here and no known model. {_advice(kind, name)}")
    if revision is not None and not _is_revision(revision):
        raise BadInput(f"revision is {revision!r}: give a commit, a tag or a branch of {model_id}.")
    wanted = revision or (known.revision if known else None)
    found = _cached(kind, model_id, name, wanted, asked=revision is not None)
    return found or _fetch(kind, model_id, name, wanted or "main", progress)


def resolve_file(name_or_path: str | os.PathLike[str]) -> Path:
    """Return a file here, or one of the hub (`owner/name/file`), fetched if need be.

    Raises `UnknownModel` where there is neither, `BadInput` where it cannot be stored.
    """
    from huggingface_hub import errors, hf_hub_download

    name = os.fspath(name_or_path)
    path = at_home(name)
    if is_file(path):
        return path
    if not _FILE.fullmatch(name) or ".." in name or isinstance(name_or_path, Path):
        raise UnknownModel(f"there is no file {name}: give one, or owner/name/file of the hub.")
    owner, repository, file = name.split("/", 2)
    model_id = f"{owner}/{repository}"
    try:
        with _quiet(progress=False):
            found = hf_hub_download(model_id, file, cache_dir=catalog.cache_folder())
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UnknownModel(
            f"there is no file {name}, and the hub has no {model_id} that you may read."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UnknownModel(
            f"there is no file {name}, it is not in the cache ({catalog.cache_folder()}), and the "
            "hub cannot be reached: load it once with a connection, or give a file."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UnknownModel(f"{model_id} has no file {file} on the hub.") from error
    except _failures() as error:
        if (unstored := _unstored(model_id, error)) is not None:
            raise unstored from error
        raise UnknownModel(
            f"{name} cannot be fetched ({type(error).__name__}): try again, or give a file."
        ) from error
    return Path(found)


def _no_default(kind: Kind[Found]) -> str:
    if kind.task == catalog.CAPTIONS:
        return "this install carries no default model: reinstall diptych."
    return f"this install carries no default model for {kind.task}: name one of `diptych models`."


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise BadInput(f"revision={revision!r} is for models of the hub; {name} is a folder here.")


def _is_revision(revision: str) -> bool:
    return bool(_BRANCH.fullmatch(revision)) and ".." not in revision


def _advice(kind: Kind[Found], name: str) -> str:
    close = difflib.get_close_matches(name, catalog.names(kind.task), n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return (
        f"{hint}Give {kind.places}, an id of the hub (owner/name), or a name from `diptych models`."
    )


# --- the cache ------------------------------------------------------------------------------------


def _cached(
    kind: Kind[Found], model_id: str, name: str, wanted: str | None, *, asked: bool
) -> Found | None:
    """Return what is in the cache, unless a branch or tag is asked for: those move."""
    if wanted is not None and _COMMIT.fullmatch(wanted):
        snapshot: Path | None = _snapshots(model_id) / wanted
    else:
        snapshot = None if asked else _at_branch(model_id, "main")
    if snapshot is None:
        return None
    # Other programs fetch what they need by itself: a captioner without a word on its pictures
    # may be one whose tokenizer and weights alone were loaded.
    if kind.task == catalog.CAPTIONS and not _tells_of_pictures(snapshot):
        return None
    return _complete(kind, snapshot, name)


def _tells_of_pictures(snapshot: Path) -> bool:
    told = any((snapshot / name).is_file() for name in (*_OF_PICTURES, "artifact.json"))
    return told or (_absences(snapshot) / _OF_PICTURES[0]).is_file()


def _absences(snapshot: Path) -> Path:
    """Return where the cache keeps empty files of the names that a commit is known not to have."""
    return snapshot.parent.parent / ".no_exist" / snapshot.name


def _note_absences(snapshot: Path, files: Sequence[str]) -> None:
    """Note that a commit with these `files` tells nothing of its pictures."""
    if not any(name in files for name in _OF_PICTURES):
        with suppress(OSError):  # then it is asked for again
            _absences(snapshot).mkdir(parents=True, exist_ok=True)
            for name in _OF_PICTURES:
                (_absences(snapshot) / name).touch()


def _at_branch(model_id: str, branch: str) -> Path | None:
    """Return the snapshot of a branch, or commit, as it was last seen."""
    if _COMMIT.fullmatch(branch):
        return _snapshots(model_id) / branch
    try:
        ref = catalog.repository_folder(model_id) / "refs" / branch
        commit = ref.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return _snapshots(model_id) / commit if _COMMIT.fullmatch(commit) else None


def _complete(kind: Kind[Found], snapshot: Path, name: str) -> Found | None:
    if not catalog.is_complete(snapshot, kind.task):
        return None
    return kind.describe(snapshot, name, snapshot.name)


def _snapshots(model_id: str) -> Path:
    return catalog.repository_folder(model_id) / "snapshots"


def _other_commits(kind: Kind[Found], model_id: str) -> list[str]:
    commits = [path for path in sorted(_snapshots(model_id).glob("*")) if _is_commit(path)]
    return [path.name for path in commits if catalog.is_complete(path, kind.task)]


def _is_commit(path: Path) -> bool:
    return bool(_COMMIT.fullmatch(path.name))


# --- the network ----------------------------------------------------------------------------------


def _fetch(kind: Kind[Found], model_id: str, name: str, revision: str, progress: bool) -> Found:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return _without_network(kind, model_id, name, revision, "HF_HUB_OFFLINE is set")
    page = f"https://huggingface.co/{model_id}"
    try:
        with _quiet(progress):
            info = HfApi().model_info(model_id, revision=revision)
            files = kind.needed([file.rfilename for file in info.siblings or []], name)
            logger.info("fetching %s at %s", model_id, info.sha)
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=catalog.cache_folder(),
                allow_patterns=files,
            )
    except errors.GatedRepoError as error:
        raise UnknownModel(
            f"{model_id} is gated: accept its terms at {page} and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UnknownModel(f"{model_id} has no revision {revision!r}: see {page}.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UnknownModel(
            f"{name!r} is no folder here, and the hub has no such model that you may read. "
            f"{_advice(kind, name)}"
        ) from error
    except _failures() as error:
        if (unstored := _unstored(model_id, error)) is not None:
            raise unstored from error
        reason = f"the hub cannot be reached ({type(error).__name__})"
        return _without_network(kind, model_id, name, revision, reason, error)
    if kind.task == catalog.CAPTIONS:
        _note_absences(Path(folder), files)
    return kind.describe(Path(folder), name, Path(folder).name)


def _failures() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises where a connection or a disk fails."""
    from huggingface_hub import errors

    names = ("HTTPError", "XetDownloadError")  # not in all of its versions
    return (OSError, *(getattr(errors, name, OSError) for name in names))


def _unstored(model_id: str, error: Exception) -> BadInput | None:
    """Return what to say where the cache cannot be written, None for other failures."""
    number = getattr(error, "errno", None)
    if number not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return None
    return BadInput(
        f"{model_id} cannot be stored in {catalog.cache_folder()}: {os.strerror(number)}. Make "
        "room, or set HF_HOME to another folder."
    )


def _without_network(
    kind: Kind[Found],
    model_id: str,
    name: str,
    revision: str,
    reason: str,
    cause: Exception | None = None,
) -> Found:
    """Return the branch as it was last seen, or say that there is nothing."""
    snapshot = _at_branch(model_id, revision)
    if snapshot is not None and (model := _complete(kind, snapshot, name)) is not None:
        logger.warning("%s: using %s at %s from the cache", reason, model_id, model.revision)
        return model
    others = _other_commits(kind, model_id)
    hint = f" Another commit is cached: revision={others[-1]!r}." if others else ""
    raise UnknownModel(
        f"{name!r} is no folder here and not in the cache ({catalog.cache_folder()}), and "
        f"{reason}: load it once with a connection, or give {kind.places}.{hint}"
    ) from cause


def _needed(files: Sequence[str], name: str) -> list[str]:
    """Choose what to fetch: no code, no other framework's weights, pickles only if need be."""
    needed = [file for file in files if file in _BESIDE]
    if "artifact.json" in needed:
        needed += [file for file in files if _NETWORKS.fullmatch(file)]
    for pattern in _WEIGHTS:
        if weights := [file for file in files if pattern.fullmatch(file)]:
            return needed + weights
    if "artifact.json" not in needed:
        shown = ", ".join(sorted(files)[:8])
        raise UnsupportedModel(
            f"{name} has no model.safetensors or pytorch_model.bin (it has {shown}): "
            "give a captioner with PyTorch weights."
        )
    return needed


_TALK = Lock()
_QUIETED: list[tuple[int, bool]] = []  # level and bars before, for each who fetches


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep huggingface_hub from drawing bars, unless asked for, and from talking."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    talker = logging.getLogger("huggingface_hub")
    with _TALK:  # what is found is put back by the last of those who fetch at once
        if not _QUIETED:
            _QUIETED.append((talker.level, are_progress_bars_disabled()))
            talker.setLevel(logging.ERROR)
        else:
            _QUIETED.append(_QUIETED[0])
        if not progress:
            disable_progress_bars()
    try:
        yield
    finally:
        with _TALK:
            level, without_bars = _QUIETED.pop()
            if not _QUIETED:
                talker.setLevel(level)
                if not without_bars:
                    enable_progress_bars()
