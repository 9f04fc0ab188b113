"""Configs of the default generator that differ from another one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "default_generator"
_spec = importlib.util.spec_from_file_location("recipe_configs", RECIPE / "configs.py")
configs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(configs)


def test_the_base_of_a_base(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1\n[train]\nsteps = 5\nmix = { x = 0.4, y = 0.6 }\n")
    (tmp_path / "b.toml").write_text('base = "a.toml"\noutput = "o"\n[train]\nmix = { x = 1 }\n')
    (tmp_path / "c.toml").write_text('base = "b.toml"\nseed = 3\n[vae]\nchannels = [1, 2]\n')
    assert configs.read(tmp_path / "c.toml") == {
        "seed": 3,
        "output": "o",
        "train": {"steps": 5, "mix": {"x": 1}},  # a value is replaced as a whole
        "vae": {"channels": [1, 2]},
    }


@pytest.mark.parametrize("path", sorted(RECIPE.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_whole(path):
    config = configs.read(path)
    if "variant" in config:  # a list of changes, for `recipes/ablations.py`
        return
    whole = configs.read(RECIPE / "config.toml")
    assert whole.keys() == config.keys()
    for mix in (config["train_vae"]["mix"], config["train"]["mix"], config["few_steps"]["mix"]):
        assert sum(mix.values()) == pytest.approx(1)


def test_what_ships_can_be_repeated_config_by_config():
    """Each begins from what one before it leaves in `runs`, which its UNet can grow from."""
    makefile = (RECIPE.parents[1] / "Makefile").read_text()
    (chain,) = [line for line in makefile.splitlines() if line.startswith("SHIPPED := ")]
    made = {}
    for name in chain.removeprefix("SHIPPED := ").split():
        config = configs.read(RECIPE / f"{name}.toml")
        stages = {
            stage: config[stage].get("start") for stage in ("train_vae", "tokenizer", "train")
        }
        stages["former"] = config["train_vae"].get("former")
        for stage, start in stages.items():
            assert start is None or start.removesuffix("/shipped") in made, (name, stage)
        few = config["few_steps"]
        assert not few.get("start") or few["start"].removesuffix("/turbo.safetensors") in made
        if stages["train"]:
            before, unet = made[stages["train"].removesuffix("/shipped")]["unet"], config["unet"]
            assert before["block_out_channels"] == unet["block_out_channels"]
            assert before["layers_per_block"] <= unet["layers_per_block"]
        made[config["output"]] = config
    assert name == "deeper"
