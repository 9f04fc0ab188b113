"""The house rules that a machine can hold: import direction, torch line, names, changelog.

Imports are read from the source with `ast`, so a lazy import inside a function counts like any
other, and nothing of the package has to be importable for the rules to be checked.
"""

from __future__ import annotations

import ast
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "diptych"

# Floors of the house, lowest first: an import goes to a lower floor or stays within its room.
# Rooms on one floor do not know each other.
FLOORS = (
    ("models",),
    ("weights",),
    ("runtimes",),
    ("image_to_text", "text_to_image"),
    ("evaluation",),
    ("training", "bulk"),
    ("server",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Leaves are open to every room but `models`, which knows nothing. They know none of ours, except
# that pictures and words that cannot be read are reported as one of our own errors.
LEAVES = {
    "errors": set(),
    "text": {"errors"},
    "remote_images": {"errors"},
    "images": {"errors", "remote_images"},
    "canvas": set(),
    "masks": {"errors", "images"},
    "inputs": {"errors"},
    "option_fields": {"errors"},
}

# Only these may import torch at the top of a file; the others reach them inside a function.
TORCH_LINE = (
    "models",
    "weights.load",
    "weights.load_generator",
    "weights.load_metric",
    "weights.load_module",
    "weights.load_parts",
    "weights.load_tiny_vae",
    "weights.save",
    "weights.save_adapters",
    "weights.save_generator",
    "weights.save_module",
    "runtimes.on_torch",
    "runtimes.on_torch_generator",
    "runtimes.on_torch_held",
    "runtimes.on_torch_recorded",
    "runtimes.on_torch_compiled",
    "runtimes.on_torch_widened",
    "runtimes.export",
    "runtimes.export_generator",
    "training",
)
# onnx comes with the export extra, and onnxruntime's quantizer imports it.
BEHIND_THE_LINE = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime.quantization")
REFERENCES = ("transformers", "diffusers", "peft", "optimum")
BANNED_FILES = {"utils", "common", "helpers"}
BANNED_FOLDERS = BANNED_FILES | {"core"}


class Import(NamedTuple):
    """One import: the dotted name, the line, whether it runs (or matters) at import time."""

    name: str
    line: int
    at_top: bool


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """Return every import of a file, `from a import b` as `a.b`, relative ones made absolute."""
    package = module if is_package else module.rpartition(".")[0]
    return list(_walk(ast.parse(source), package, at_top=True))


def _walk(node: ast.AST, package: str, *, at_top: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_top)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute("." * node.level + (node.module or ""), package)
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, at_top)
    elif isinstance(node, ast.Call) and (name := _dynamic_import(node)):
        yield Import(_absolute(name, package), node.lineno, at_top)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.body:
            yield from _walk(child, package, at_top=False)
        for child in node.orelse:
            yield from _walk(child, package, at_top=at_top)
        return
    lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, at_top=at_top and not lazy)


def _dynamic_import(call: ast.Call) -> str | None:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in {"import_module", "__import__"} or not call.args:
        return None
    argument = call.args[0]
    is_text = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    return argument.value if is_text else None


def _is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in {getattr(test, "id", ""), getattr(test, "attr", "")}


def _absolute(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *filter(None, [name[level:]])])


def _is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _ours(name: str) -> str | None:
    """`diptych.images.to_pixels` → `images.to_pixels`; None for what is not ours."""
    if name == "diptych":
        return "__init__"
    return name.removeprefix("diptych.") if name.startswith("diptych.") else None


def _room(inner: str) -> str:
    """The room of `images.to_pixels`; a public name of the package belongs to the front door."""
    head = inner.partition(".")[0]
    return head if head in FLOOR_OF or head in LEAVES else "__init__"


def module_of(path: PurePosixPath) -> tuple[str, bool]:
    """`weights/load.py` → (`diptych.weights.load`, False); True for the `__init__` of a room.

    The front door is treated as a module of its own, `diptych.__init__`.
    """
    parts = ("diptych", *path.with_suffix("").parts)
    is_package = len(parts) > 2 and parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def violations(source: str, path: str) -> list[str]:
    """Return what the file at `path` (relative to the package) breaks, one sentence each."""
    module, is_package = module_of(PurePosixPath(path))
    inner = module.removeprefix("diptych.")
    room = inner.partition(".")[0]
    if room not in FLOOR_OF and room not in LEAVES:
        return [f"{path}: fits no room of the house"]
    return [
        f"{path}:{imported.line}: {broken}"
        for imported in imports_of(source, module, is_package=is_package)
        for broken in _judge(imported, inner, room)
    ]


def _judge(imported: Import, inner: str, room: str) -> Iterator[str]:
    name, _, at_top = imported
    if _is_within(name, REFERENCES):
        yield f"{name} is a reference for tests and benchmarks only"
    target = _ours(name)
    behind = _is_within(name, BEHIND_THE_LINE) if target is None else _is_within(target, TORCH_LINE)
    if at_top and behind and not _is_within(inner, TORCH_LINE):
        yield f"{name} lies behind the torch line: import it inside a function"
    if target is None:
        outside = name.partition(".")[0]
        if room == "models" and outside != "torch" and outside not in sys.stdlib_module_names:
            yield f"models know torch and nothing else, not {name}"
    elif target != "__version__" and not _may_import(room, _room(target)):
        yield f"{room} may not import {name} ({_room(target)})"


def _may_import(room: str, target: str) -> bool:
    if room in LEAVES:
        return target == room or target in LEAVES[room]
    if target in LEAVES:
        return room != "models"
    return target == room or FLOOR_OF[target] < FLOOR_OF[room]


def misnamed(paths: list[str]) -> list[str]:
    """Return the paths (relative to the package) with a name that means nothing."""
    return [
        path
        for path in paths
        if PurePosixPath(path).stem in BANNED_FILES
        or BANNED_FOLDERS.intersection(PurePosixPath(path).parent.parts)
    ]


def changelog_top(text: str) -> str | None:
    """Return the version of the first released heading, as in `## [0.1.0] - 2026-01-31`."""
    match = re.search(r"^## \[?(\d[^\]\s]*)\]?", text, re.MULTILINE)
    return match and match[1]


# The rules, held against the package.

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_there_is_a_package_to_check() -> None:
    assert "errors.py" in FILES


@pytest.mark.parametrize("path", FILES)
def test_imports_keep_the_house_rules(path: str) -> None:
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == []


def test_names_mean_something() -> None:
    assert misnamed(FILES) == []


def test_changelog_tells_about_this_version() -> None:
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert version, "src/diptych/__init__.py has no __version__"
    assert changelog_top((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")) == version[1]


# The checker, held against files that break the rules and files that do not.

BROKEN = {
    "up": ("weights/files.py", "from diptych.runtimes import network"),
    "up, lazily": ("models/vit.py", "def f():\n    from diptych.weights import load"),
    "up, in a method": ("weights/hub.py", "class A:\n  def f(self):\n    import diptych.cli"),
    "up, relatively": ("runtimes/network.py", "from ..image_to_text import captioner"),
    "up, from the package": ("runtimes/network.py", "from .. import server"),
    "up, by name": ("weights/hub.py", "import importlib\nimportlib.import_module('diptych.cli')"),
    "up, by relative name": ("weights/hub.py", "import_module('..cli', __package__)"),
    "up, for types": (
        "models/vit.py",
        "if TYPE_CHECKING:\n    import diptych.runtimes",
    ),
    "up, in a package's init": ("weights/__init__.py", "from ..runtimes import network"),
    "to the door": ("evaluation/comparison.py", "from diptych import cli"),
    "to the front door": ("evaluation/comparison.py", "from diptych import Captioner"),
    "to the bare package": ("runtimes/network.py", "import diptych"),
    "sideways": ("image_to_text/captioner.py", "from diptych.text_to_image import samplers"),
    "sideways, lazily": ("text_to_image/style.py", "def f():\n    import diptych.image_to_text"),
    "sideways between work rooms": (
        "bulk/journal.py",
        "def f():\n    from diptych.training import data",
    ),
    "a leaf into a room": ("text.py", "from diptych.weights import files"),
    "a leaf into a leaf": ("images.py", "from diptych.text import Gpt2Tokenizer"),
    "errors into a leaf": ("errors.py", "from . import text"),
    "models into a leaf": ("models/vit.py", "from diptych.errors import BadInput"),
    "models into a library": ("models/vit.py", "import numpy"),
    "no such room": ("loaders/a.py", "import os"),
    "torch at the top": ("weights/files.py", "import torch"),
    "torch at the top, from": ("image_to_text/decoding.py", "from torch.nn import functional"),
    "torch at the top, tried": ("images.py", "try:\n    import torch\nexcept ImportError: pass"),
    "torch at the top, in a class": ("text.py", "class A:\n    import torch"),
    "torch unless types": ("text.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
    "onnx at the top": ("runtimes/quantize.py", "import onnx"),
    "onnx through onnxruntime": ("runtimes/quantize.py", "from onnxruntime import quantization"),
    "torch through ours": ("weights/__init__.py", "from diptych.weights.load import load"),
    "torch through ours, relatively": ("weights/__init__.py", "from . import save"),
    "torch through models": ("image_to_text/captioner.py", "from diptych.models.vit import ViT"),
    "torch through the door": ("__init__.py", "from .runtimes.export import export"),
    "transformers": ("runtimes/network.py", "import transformers"),
    "transformers, lazily": ("training/data.py", "def f():\n    from transformers import ViT"),
    "diffusers, for types": ("cli.py", "if TYPE_CHECKING:\n    import diffusers.models"),
    "peft, by name": ("training/loop.py", "__import__('peft')"),
}

KEPT = {
    "down": ("training/loop.py", "from diptych.text_to_image import denoiser"),
    "down many floors": ("cli.py", "def f():\n    from diptych.weights import load"),
    "within a room": ("models/vit.py", "from diptych.models.layers import attention"),
    "within a room, relatively": ("models/vit.py", "from .layers import attention"),
    "within a package's init": ("models/__init__.py", "from .vit import ViT"),
    "to a leaf": ("weights/files.py", "from diptych.errors import UnknownModel"),
    "to a leaf, from the package": ("cli.py", "from . import images, text"),
    "a leaf to errors": ("images.py", "from diptych.errors import BadImage"),
    "the version": ("runtimes/network.py", "def f():\n    from diptych import __version__"),
    "the front door, lazily": ("__init__.py", "def f():\n    from .image_to_text import captioner"),
    "main to the door": ("__main__.py", "from diptych.cli import main"),
    "torch in models": ("models/vit.py", "import math\nimport torch\nfrom torch import nn"),
    "torch in the line": ("weights/load.py", "import torch\nfrom diptych.models.vit import ViT"),
    "onnx in the line": ("runtimes/export.py", "import onnx\nfrom . import on_torch"),
    "torch in training": ("training/loop.py", "import torch\nfrom diptych.weights import save"),
    "torch, lazily": ("weights/files.py", "def f():\n    import torch"),
    "torch, lazily in a method": ("text.py", "class A:\n  async def f(self):\n    import torch"),
    "torch, for types": ("text.py", "import typing\nif typing.TYPE_CHECKING:\n    import torch"),
    "torch through ours, lazily": ("weights/__init__.py", "def f():\n    from . import load"),
    "a similar name": ("weights/files.py", "import torchless, onnxruntime, diptychs.cli"),
    "a similar call": ("weights/files.py", "import_module(name)\nimport_module()"),
}


@pytest.mark.parametrize(("path", "source"), BROKEN.values(), ids=BROKEN)
def test_checker_finds(path: str, source: str) -> None:
    (broken,) = violations(source, path)
    assert broken.startswith(path)


@pytest.mark.parametrize(("path", "source"), KEPT.values(), ids=KEPT)
def test_checker_allows(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_checker_names_the_line_and_every_import() -> None:
    found = violations("import os\n\nfrom diptych import cli, server\n", "weights/hub.py")
    assert found == [
        "weights/hub.py:3: weights may not import diptych.cli (cli)",
        "weights/hub.py:3: weights may not import diptych.server (server)",
    ]


@pytest.mark.parametrize("path", ["models/utils.py", "common.py", "core/a.py", "bulk/helpers/a.py"])
def test_checker_finds_empty_names(path: str) -> None:
    assert misnamed([path, "models/vit.py", "score.py"]) == [path]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("# Changelog\n\n## [0.2.0] - 2026-01-31\n\n## [0.1.0]\n", "0.2.0"),
        ("# Changelog\n\n## [Unreleased]\n\n## 1.0.0rc1\n", "1.0.0rc1"),
        ("# Changelog\n\n### 0.1.0\n", None),
    ],
)
def test_changelog_top(text: str, version: str | None) -> None:
    assert changelog_top(text) == version


# The suite itself: offline, by conftest.py.


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
def test_other_machines_are_out_of_reach(connect: str, host: str) -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match="a test tried to reach"):
        getattr(client, connect)((host, 80))


def test_names_of_other_machines_are_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match="a test tried to"):
        socket.create_connection(("example.invalid", 80))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_within_reach(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
