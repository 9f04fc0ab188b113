"""`diptych` as a function of its arguments: what a process would do, without starting one."""

from __future__ import annotations

import io
import sys
from typing import NamedTuple

import pytest

from diptych.cli import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


def call(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
    stdin: bytes = b"",
) -> Done:
    """Run the command line to its end; return its exit code and what it wrote."""
    monkeypatch.setattr(sys, "argv", ["diptych", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return Done(int(ended.value.code or 0), out, err)
