"""Change one thing at a time in a recipe, and see what it was worth.

    python recipes/ablations.py RECIPE/ablations.toml [--parallel 4] [--only NAME ...]

The file names the config that the variants differ from, the stages to run for each, the files of
that config's own run that each begins from, and the variants. Every variant gets a folder and a
config of its own; the last row of its log is what it was worth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--parallel", type=int, default=1, help="variants at once")
    parser.add_argument("--only", nargs="*", help="names of variants")
    arguments = parser.parse_args()
    plan = tomllib.loads(arguments.file.read_text(encoding="utf-8"))
    base = tomllib.loads((arguments.file.parent / plan["config"]).read_text(encoding="utf-8"))
    variants = [v for v in plan["variant"] if not arguments.only or v["name"] in arguments.only]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        rows = list(pool.map(lambda each: run(each, plan, base, arguments.file.parent), variants))
    print("\n".join(json.dumps(row) for row in rows))


def run(
    variant: dict[str, Any], plan: dict[str, Any], base: dict[str, Any], recipe: Path
) -> dict[str, Any]:
    """Run the stages of a variant; return its name, the seconds and the last row of its log."""
    config = deepcopy(base)
    for name in plan.get("drop", []):
        section, key = name.split(".")
        config[section].pop(key, None)
    merge(config, plan.get("common", {}))
    merge(config, variant.get("change", {}))
    start = Path(base["output"])
    folder = start / "ablations" / variant["name"].replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    config["output"] = str(folder)
    for name in set(plan.get("take", [])) - set(variant.get("without", [])):
        if (start / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to((start / name).resolve())
    (folder / "config.toml").write_text(toml(config), encoding="utf-8")
    began = time.time()
    with (folder / "log.txt").open("ab") as log:
        for stage in [*variant.get("before", []), *plan["stages"]]:
            command = [sys.executable, str(recipe / f"{stage}.py"), str(folder / "config.toml")]
            done = subprocess.run(command, stdout=log, stderr=log, check=False)
            if done.returncode:
                return {"name": variant["name"], "failed": stage}
    (*_, last) = (folder / plan["report"]).read_text(encoding="utf-8").splitlines()
    row = {"name": variant["name"], "took": round(time.time() - began), **json.loads(last)}
    (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")
    return row


def merge(config: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put changed values into the sections of a config; a value is replaced as a whole."""
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name] = {**config.get(name, {}), **value}
        else:
            config[name] = value


def toml(config: dict[str, Any]) -> str:
    """Write a config of plain values and of sections of them."""
    tops = [f"{name} = {inline(v)}" for name, v in config.items() if not isinstance(v, dict)]
    for name, section in config.items():
        if isinstance(section, dict):
            tops += [f"\n[{name}]", *(f"{key} = {inline(value)}" for key, value in section.items())]
    return "\n".join(tops) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


if __name__ == "__main__":
    main()
