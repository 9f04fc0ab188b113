"""Read a config; `base` names another one, of the same folder, that it differs from."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import merge


def asked() -> dict[str, Any]:
    """Return the config that the first argument of the command names, else `config.toml`."""
    return read(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("config.toml"))


def read(path: Path) -> dict[str, Any]:
    """Return a config; its values replace those of its `base`, section by section."""
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    if (base := config.pop("base", None)) is None:
        return config
    whole = read(path.with_name(base))
    merge(whole, config)
    return whole
