"""Run what the pages show with the default model, and write down what it prints.

    python docs/generate_outputs.py

After `<!-- prints: COMMAND -->` comes a block of text that holds what the command prints; after
`<!-- prints: python -->`, what the Python block before it prints. Run it after a change of the
default model. The words may differ between processors, so no test compares them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "quickstart.md"]
PRINTS = re.compile(r"<!-- prints: (?P<what>[^\n]+?) -->\s*```text\n(?P<text>.*?)```\n", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Fill every marked block of every page."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "src"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = PRINTS.sub(fill, text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} written")  # noqa: T201


def fill(found: re.Match[str]) -> str:
    """Return the marker and its block, with what is printed now."""
    what = found["what"]
    printed = run_python(found.string[: found.start()]) if what == "python" else run_command(what)
    before = found[0][: found.start("text") - found.start()]
    return f"{before}{printed.rstrip()}\n```\n"


def run_command(command: str) -> str:
    """Return what a `diptych` command prints on standard output."""
    program, *arguments = shlex.split(command)
    assert program == "diptych", command
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "diptych", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout


def run_python(page: str) -> str:
    """Return what the last Python block of a page prints, after those before it."""
    names: dict[str, Any] = {}
    printed = ""
    for block in PYTHON.findall(page):
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(block, names)
        printed = stream.getvalue()
    return printed


if __name__ == "__main__":
    main()
