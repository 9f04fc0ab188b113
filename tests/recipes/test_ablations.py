"""Variants of a recipe: each runs with its own config, from the files it is given."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAGE = """
import json, sys, tomllib
from pathlib import Path
from typing import Any
config = tomllib.loads(Path(sys.argv[1]).read_text())
output = Path(config["output"])
if config["train"]["steps"] == 13:
    sys.exit("thirteen")
row = {"steps": config["train"]["steps"], "seconds": config["train"].get("seconds"),
       "mix": config["train"]["mix"], "started": (output / "start.txt").exists(),
       "prepared": (output / "prepared").exists()}
with (output / "train.jsonl").open("a") as file:
    file.write(json.dumps(row) + "\\n")
"""
PLAN = """
config = "base.toml"
stages = ["train"]
report = "train.jsonl"
take = ["start.txt"]
drop = ["train.seconds"]
[common.train]
steps = 5
[[variant]]
name = "base"
[[variant]]
name = "more steps"
change = { train = { steps = 7, mix = { b = 1.0 } } }
before = ["prepare"]
[[variant]]
name = "from nothing"
without = ["start.txt"]
[[variant]]
name = "breaks"
change = { train = { steps = 13 } }
"""


@pytest.fixture
def recipe(tmp_path):
    folder, output = tmp_path / "recipe", tmp_path / "run"
    folder.mkdir()
    output.mkdir()
    (output / "start.txt").write_text("weights")
    (folder / "base.toml").write_text(
        f"seed = 1\noutput = {json.dumps(str(output))}\n"
        '[train]\nsteps = 100\nseconds = 60\nmix = { a = 0.5, b = 0.5 }\nname = "a \\"b\\""\n'
    )
    (folder / "train.py").write_text(STAGE)
    prepare = "import sys, tomllib; from pathlib import Path; "
    prepare += "(Path(tomllib.loads(Path(sys.argv[1]).read_text())['output']) / 'prepared').touch()"
    (folder / "prepare.py").write_text(prepare)
    (folder / "ablations.toml").write_text(PLAN)
    return folder


def run(recipe: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, ROOT / "recipes" / "ablations.py", recipe / "ablations.toml"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_variants_differ_in_what_they_change_alone(recipe):
    command = [
        sys.executable,
        str(ROOT / "recipes" / "ablations.py"),
        str(recipe / "ablations.toml"),
    ]
    done = subprocess.run([*command, "--parallel", "2"], capture_output=True, text=True, check=True)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    told = {
        name: [row.get(key) for key in ("steps", "seconds", "mix", "started", "prepared")]
        for name, row in rows.items()
    }
    both = {"a": 0.5, "b": 0.5}
    assert told["base"] == [5, None, both, True, False]
    assert told["more steps"] == [7, None, {"b": 1.0}, True, True]
    assert told["from nothing"] == [5, None, both, False, False]
    assert rows["breaks"] == {"name": "breaks", "failed": "train"}

    folder = recipe.parent / "run" / "ablations"
    config = tomllib.loads((folder / "more-steps" / "config.toml").read_text())
    assert config["train"]["name"] == 'a "b"'
    assert config["seed"] == 1
    assert "thirteen" in (folder / "breaks" / "log.txt").read_text()


def test_one_variant_alone(recipe):
    assert list(run(recipe, "--only", "from nothing")) == ["from nothing"]


@pytest.mark.parametrize("name", ["default_captioner", "default_generator"])
def test_plans_name_stages_and_settings_that_exist(name):
    folder = ROOT / "recipes" / name
    plan = tomllib.loads((folder / "ablations.toml").read_text(encoding="utf-8"))
    base = tomllib.loads((folder / plan["config"]).read_text(encoding="utf-8"))
    names = [variant["name"] for variant in plan["variant"]]
    assert len(names) == len(set(names))
    known = {**base, "text": None, "otherwise": None}
    for variant in plan["variant"]:
        for stage in (*plan["stages"], *variant.get("before", [])):
            assert (folder / f"{stage}.py").exists()
        assert set(variant.get("without", [])) <= set(plan["take"])
        for section, changes in variant.get("change", {}).items():
            assert section in known
            if known[section] and isinstance(changes, dict):
                assert set(changes) <= {*known[section], "captions"}
