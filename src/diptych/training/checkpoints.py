"""Keep the state of a run so that no kill loses it, and no second run writes over it.

A checkpoint is a folder: written under another name, flushed to the disk, listed with its hashes
in a manifest, then renamed. The newest one whose files all have the hashes they should is the last
good one. No pickle is read or written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diptych.errors import BadInput
from diptych.weights.save_module import staged, sync, write_file

__all__ = ["Checkpoint", "Checkpoints", "locked", "write_whole"]

logger = logging.getLogger("diptych")

_NAME = re.compile(r"step-(\d+)")
_STATE, _PROGRESS, _MANIFEST = "state.safetensors", "progress.json", "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Hold one state: named tensors, and what JSON can hold of it."""

    step: int
    tensors: Mapping[str, Tensor]
    progress: Mapping[str, Any]


class Checkpoints:
    """Write, find and thin out the checkpoints below `folder`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self._keep = folder, keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; raises `BadInput` where the disk has no room, and harms no other."""
        target = self.folder / f"step-{checkpoint.step:08d}"
        packed = {
            name: each.detach().cpu().contiguous() for name, each in checkpoint.tensors.items()
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if target.exists():
                if _fault(target) is None:
                    return target  # the state of a step is always the same
                shutil.rmtree(target)
            with staged(target) as staging:
                save_file(packed, staging / _STATE, {"format": "pt"})
                sync(staging / _STATE)
                write_file(staging / _PROGRESS, json.dumps(checkpoint.progress, sort_keys=True))
                files = {name: _describe(staging / name) for name in (_STATE, _PROGRESS)}
                manifest = {"step": checkpoint.step, "files": files}
                write_file(staging / _MANIFEST, json.dumps(manifest, sort_keys=True))
        except (OSError, SafetensorError) as error:
            raise BadInput(
                f"{self.folder}: a checkpoint of step {checkpoint.step} cannot be written "
                f"({getattr(error, 'strerror', None) or error}). {self._what_is_left()}"
            ) from error
        self._thin_out(target)
        return target

    def last(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None.

        Damaged ones are told of and get another name, so that they count no more.
        """
        for step, path in reversed(self._all()):
            reason = _fault(path)
            if reason is None:
                with safe_open(path / _STATE, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
                progress = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
                return Checkpoint(step, tensors, progress)
            logger.warning("%s is damaged (%s): the one before it is taken", path, reason)
            with contextlib.suppress(OSError):
                path.rename(path.with_name(f"damaged-{path.name}"))
        return None

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, or None."""
        there = self._all()
        return there[-1][0] if there else None

    def _all(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = [(m, path) for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name))]
        return sorted((int(match[1]), path) for match, path in found)

    def _thin_out(self, latest: Path) -> None:
        others = [path for _, path in self._all() if path != latest]
        for path in others[: max(0, len(others) + 1 - self._keep)]:
            # Renamed first, so that no half of it looks like a whole one.
            doomed = path.with_name(f".{path.name}.old")
            with contextlib.suppress(OSError):
                shutil.rmtree(doomed, ignore_errors=True)
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _what_is_left(self) -> str:
        step = self.newest_step()
        if step is None:
            return "Make room and start again: there is none before it."
        return f"That of step {step} is whole: make room, and go on from there by resuming."


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        for name in (_STATE, _PROGRESS):
            if _describe(path / name) != files[name]:
                return f"{name} is not what the manifest says"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file, down to the disk, in one step: the old one stands until then."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, content)
    partial.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` while this one works; a kill lets go of it.

    Raises `BadInput` where another run is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+b")
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror or error})") from error
    with file:
        try:
            _lock(file)
        except OSError as error:
            raise BadInput(
                f"{folder}: another run is at work there: wait for it, or give another folder"
            ) from error
        yield


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
