"""Write the folder of an artifact: whole, with the hashes of its files."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diptych import __version__
from diptych.errors import BadInput
from diptych.inputs import is_there
from diptych.runtimes.graph import data_path, weights_file

__all__ = [
    "NETWORKS",
    "SHARED_WEIGHTS",
    "copy_tokenizer",
    "file_entry",
    "network_entry",
    "network_path",
    "network_size",
    "staged",
    "versions",
    "write_artifact",
    "write_json",
]

NETWORKS = ("encoder", "decoder")
# Networks that keep no weights of their own, and whose they take.
SHARED_WEIGHTS = {"unet_shallow": "unet"}

_FORMAT, _VERSION = "diptych-artifact", 1


def network_path(folder: Path, network: str) -> Path:
    """Return the file of a network in the folder of an artifact."""
    return folder / f"{network}.onnx"


def network_size(path: Path) -> int:
    """Return the bytes of a network, its own weights included."""
    own = data_path(path)
    return path.stat().st_size + (own.stat().st_size if own.exists() else 0)


def write_artifact(
    folder: Path,
    document: Mapping[str, Any],
    *,
    task: str = "image-to-text",
    networks: Sequence[str] = NETWORKS,
) -> None:
    """Write `artifact.json` for the networks that are in `folder`; `document` is the rest."""
    files = {network: network_entry(network_path(folder, network)) for network in networks}
    write_json(
        folder / "artifact.json",
        {
            "format": _FORMAT,
            "version": _VERSION,
            "task": task,
            **document,
            "networks": files,
            "diptych_version": __version__,
        },
    )


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` for people to read, too."""
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy `tokenizer.json`, or `vocab.json` with the `merges.txt` beside it."""
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    if tokenizer.name == "vocab.json":
        shutil.copyfile(tokenizer.with_name("merges.txt"), folder / "merges.txt")


def versions(*packages: str) -> dict[str, str]:
    """Return what made a file: versions of packages, the system and the processor."""
    found = {"diptych": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "system": platform.system(), "machine": platform.machine()}


@contextmanager
def staged(folder: Path, *, adds: bool = False) -> Iterator[Path]:
    """Give a folder to write into, whose files take their places in `folder` at the end.

    A new folder appears whole; in one that exists each file is replaced whole, `artifact.json`,
    which states the hashes of the others, last, and what spoke of another model there is removed,
    unless the writer `adds` to it. Raises `BadInput` where it cannot be written.
    """
    is_new = not is_there(folder)
    if not is_new and not folder.is_dir():
        raise BadInput(f"{folder} is a file: give a folder to write to")
    beside = folder.parent if is_new else folder
    staging = beside / f".{folder.name}.{secrets.token_hex(4)}.partial"
    try:
        staging.mkdir(parents=True)
        yield staging
        if is_new:
            staging.rename(folder)
        else:
            files = [path for path in staging.rglob("*") if path.is_file()]
            _make_way({path.relative_to(staging) for path in files}, folder, adds=adds)
            for path in sorted(files, key=lambda path: path.name == "artifact.json"):
                target = folder / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else folder
        if not named.is_relative_to(beside) and named != folder:
            raise BadInput(
                f"{folder} cannot be written, for {named} cannot be read: {error.strerror or error}"
            ) from error
        raise BadInput(
            f"{folder} cannot be written: {error.strerror or error}: make room, or give another"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _make_way(names: Set[Path], folder: Path, *, adds: bool) -> None:
    """Remove from `folder` what would speak of the model before; raise `BadInput` for folders.

    A `tokenizer.json` is read before a `vocab.json`; a report and weights belong to their model.
    """
    for name in names:
        if (folder / name).is_dir():
            raise BadInput(f"{folder / name} is a folder: give another folder to write to")
    if adds:
        return
    stale = {Path("export.json"), Path("quantize.json")}
    stale |= {name.with_name("tokenizer.json") for name in names if name.name == "vocab.json"}
    stale |= {name.with_name(f"{name.name}.data") for name in names if name.suffix == ".onnx"}
    for name in stale - names:
        (folder / name).unlink(missing_ok=True)


def network_entry(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Return what `artifact.json` says of the network at `path`, and of its weights in `folder`."""
    folder = folder or path.parent
    weights = folder / weights_file(path)
    if not weights.exists():
        return file_entry(path)
    # Bytes are counted whenever the model is opened; a checkpoint that is shared may change.
    counted = {"bytes": weights.stat().st_size} if weights == data_path(path) else {}
    return {**file_entry(path), "data": {**file_entry(weights, folder), **counted}}


def file_entry(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Return the name of a file, from `folder` on, and what it is to be held against."""
    name = path.relative_to(folder or path.parent).as_posix()
    with path.open("rb") as file:
        return {"file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
