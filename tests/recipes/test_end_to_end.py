"""The one-command recipes, on generated pictures: through to the end, and killed on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
_spec = importlib.util.spec_from_file_location("ablations", RECIPES / "ablations.py")
ablations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ablations)

WAIT_S = 300
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "grey": (90,) * 3}
THINGS = ("dog", "cat", "ball", "tree", "boat")
PLACES = ("on the grass", "in the snow", "near the water", "under the sky")

# What makes the shipped configs small. Everything else is as in them.
CAPTIONER = {
    "encoder": {
        "image_size": 32,
        "stem_channels": [8, 8, 8, 16],
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "decoder": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "vocab_size": 300,
    },
    "pretrain": {"image_size": 32, "epochs": 3, "batch_size": 16, "warmup_steps": 4},
    "train": {"epochs": 3, "batch_size": 8, "warmup_steps": 4, "stored_size": 40, "things": 3},
    "refine": {"epochs": 2, "batch_size": 8, "samples": 2, "warmup_steps": 2, "things": 3},
}
GENERATOR = {
    "vae": {"latent_channels": 4, "block_out_channels": [8, 8], "norm_num_groups": 4},
    "train_vae": {"steps": 450, "batch_size": 2, "crop": 32, "warmup_steps": 10, "scenes": 40},
    "tokenizer": {"vocab_size": 600, "model_max_length": 24},
    "text_encoder": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "words": {"steps": 40, "batch_size": 8},
    "unet": {
        "block_out_channels": [8, 16, 16],
        "num_attention_heads": [2, 2, 2],
        "norm_num_groups": 4,
    },
    "train": {"steps": 140, "batch_size": 4, "warmup_steps": 5, "scenes": 40},
    "few_steps": {
        "walks": 32,
        "walks_batch_size": 8,
        "steps": 110,
        "batch_size": 8,
        "teacher_steps": 8,
        "rank": 2,
    },
}
PAINTED = {"painted": 0.5, "painted_until": 250}
# The painter saves every four minutes, and is not watched for so long here.
SAVING = """
import sys
sys.path.insert(0, "recipes/default_generator")
import train
train.SAVE_EVERY_S = 0.0
train.main()
"""


# --- pictures, and configs ------------------------------------------------------------------------


def picture(rng: np.random.Generator, size: int) -> tuple[Image.Image, str, str]:
    """Draw a square on grey noise; return it with its colour and the thing that it stands for."""
    pixels = rng.integers(100, 220, (size, size, 3), dtype=np.uint8)
    (colour, thing) = rng.choice(list(COLOURS)), rng.choice(THINGS)
    top, left = rng.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = COLOURS[colour]
    return Image.fromarray(pixels), str(colour), str(thing)


def captioned(folder: Path, counts: dict[str, int], size: int, rng: np.random.Generator) -> None:
    (folder / "images").mkdir(parents=True)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as rows:
        for split in (split for split, count in counts.items() for _ in range(count)):
            image, colour, thing = picture(rng, size)
            places = rng.choice(PLACES, 5)
            captions = [f"A {colour} {thing} is {place} ." for place in places]
            name = f"images/{rng.integers(10**9)}.png"
            image.save(folder / name)
            row = {"file": name, "captions": captions, "split": split, "label": "daisy"}
            rows.write(json.dumps(row) + "\n")


def classes(folder: Path, counts: dict[str, int], rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    names = [{"name": "espresso" if label % 2 else "comic book"} for label in range(200)]
    (folder / "classes.json").write_text(json.dumps(names))
    for split, count in counts.items():
        files = []
        for _ in range(count):
            picture(rng, 64)[0].save(folder / "one.webp")
            files.append((folder / "one.webp").read_bytes())
        offset = np.cumsum([0, *map(len, files)])
        (folder / f"{split}.bin").write_bytes(b"".join(files))
        np.savez(folder / f"{split}_index.npz", offset=offset, label=rng.integers(0, 200, count))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    classes(folder / "tiny_imagenet_64", {"train": 64, "val": 20}, rng)
    captioned(folder / "flickr8k_224", {"train": 20, "extra": 2, "val": 12, "test": 4}, 224, rng)
    captioned(folder / "pascal_sentences_224", {"train": 6, "val": 2}, 192, rng)
    for name in ("flowers_128", "noto_emoji_128", "fxemoji_128"):
        captioned(folder / name, {"train": 12, "val": 4}, 128, rng)
    return folder


def config(recipe: str, small: dict[str, Any], data: Path, output: Path) -> Path:
    """Write the recipe's own config, made small, and return where."""
    words = tomllib.loads((RECIPES / recipe / "config.toml").read_text(encoding="utf-8"))
    ablations.merge(words, {"data": str(data), "output": str(output), **small})
    path = output.with_suffix(".toml")
    path.write_text(ablations.toml(words), encoding="utf-8")
    return path


# --- runs -----------------------------------------------------------------------------------------


class Runs:
    """Start recipes in process groups of their own, so that all of a group can be killed."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def make(self, target: str, config: Path) -> list[str]:
        # Nothing is to be installed: the stamp counts as made, wherever this python lives.
        environment = Path(sys.executable).parents[1]
        asked = [f"DEV={environment}", f"CONFIG={config}", "PROCESSES=1"]
        return ["make", "-s", "-o", f"{environment}/.installed", target, *asked]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, command: list[str]) -> None:
        process = self.start(command)
        assert process.wait(WAIT_S) == 0, self.log.read_text(errors="replace")[-3000:]

    def kill(self, command: list[str], log: Path, rows: int) -> None:
        """Kill everything of a run as soon as `log` has so many rows."""
        process, until = self.start(command), time.monotonic() + WAIT_S
        while not (log.exists() and log.read_bytes().count(b"\n") >= rows):
            said = self.log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)


def equal(first: Path, second: Path) -> None:
    """Compare all tensors of two files, bit for bit."""
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=f"{first.name}: {name}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_captioner_from_pictures_to_shipped_files_with_kills(data, tmp_path):
    recipe, runs = "default_captioner", Runs(tmp_path / "log.txt")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    once = config(recipe, CAPTIONER, data, whole)
    for stage in ("pretrain", "tokenizer", "train", "refine"):
        runs.finish([sys.executable, f"recipes/{recipe}/{stage}.py", str(once)])

    command = runs.make("default-captioner", config(recipe, CAPTIONER, data, killed))
    for log, rows in (("pretrain", 2), ("train", 1), ("refine", 2)):
        runs.kill(command, killed / f"{log}.jsonl", rows)
    runs.finish(command)
    for name in ("pretrain", "train", "best", "refine"):
        equal(whole / f"{name}.safetensors", killed / f"{name}.safetensors")

    from diptych import Captioner

    photo = next((data / "flickr8k_224" / "images").iterdir())
    for runtime in ("onnxruntime", "torch"):
        captioner = Captioner.load(killed / "shipped", runtime=runtime)
        assert isinstance(captioner.caption(photo).text, str)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_that_are_for_ablations_alone(data, tmp_path):
    runs, output = Runs(tmp_path / "log.txt"), tmp_path / "run"
    plan = tomllib.loads((RECIPES / "default_captioner" / "ablations.toml").read_text())
    few = {"steps": 3, "batch_size": 8, "warmup_steps": 1}
    small = {**CAPTIONER, "text": {**plan["common"]["text"], **few}}
    small["otherwise"] = {**plan["common"]["otherwise"], **few, "image_size": 32}
    small["train"] = {**CAPTIONER["train"], "epochs": 1}

    def run(stage: str, **changes: dict[str, Any]) -> None:
        words = {
            name: {**small.get(name, {}), **changes.get(name, {})} for name in {*small, *changes}
        }
        path = config("default_captioner", words, data, output)
        runs.finish([sys.executable, f"recipes/default_captioner/{stage}.py", str(path)])

    run("tokenizer")
    run("text")
    for kind in ("masked", "contrast"):
        run("otherwise", otherwise={"kind": kind})
        names = load_file(output / "pretrain.safetensors")
        assert any(name.startswith("average.encoder.") for name in names)
    run("train")  # from what both of them left
    first = output / "best.safetensors"
    first.rename(output / "teacher.safetensors")
    (output / "train.safetensors").unlink()
    teachers = {"teachers": [str(output / "teacher.safetensors")], "teachers_share": 0.5}
    run("train", train={**teachers, "things": 0})
    losses = [json.loads(row)["loss"] for row in (output / "train.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generator_from_pictures_to_shipped_files_with_kills(data, tmp_path):
    recipe, runs = "default_generator", Runs(tmp_path / "log.txt")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    once = config(recipe, GENERATOR, data, whole)
    for stage in ("train_vae", "tokenizer", "words", "train"):
        runs.finish([sys.executable, f"recipes/{recipe}/{stage}.py", str(once)])
    for stage in ("ship", "few_steps"):
        shipped = str(whole / "shipped")
        runs.finish([sys.executable, f"recipes/{recipe}/{stage}.py", str(once), shipped])

    path = config(recipe, GENERATOR, data, killed)
    command = runs.make("default-generator", path)
    runs.kill(command, killed / "vae.jsonl", 2)
    runs.kill(command, killed / "train.jsonl", 1)  # nothing saved yet: it begins again
    runs.kill([sys.executable, "-c", SAVING, str(path)], killed / "train.jsonl", 2)
    runs.kill(command, killed / "few.jsonl", 1)
    runs.finish(command)
    runs.finish([sys.executable, f"recipes/{recipe}/train_vae.py", str(path)])  # nothing is left
    for name in ("vae", "words", "latents", "train", "few", "shipped/turbo"):
        equal(whole / f"{name}.safetensors", killed / f"{name}.safetensors")

    from diptych import ImageGenerator
    from diptych.weights.diffusion import describe_generator

    for runtime in ("onnxruntime", "torch"):
        generator = ImageGenerator.load(killed / "shipped", runtime=runtime)
        made = generator.generate("a red circle", seed=1, num_inference_steps=2)
        assert made.image.size == (128, 128)
    assert describe_generator(killed / "shipped").editions["turbo"].defaults == {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "sampler": "ddim",
    }
    _goes_on(runs, path, tmp_path)


def _goes_on(runs: Runs, path: Path, folder: Path) -> None:
    """Go on from what has shipped: only the decoder, with a last look, and a deeper painter."""
    before, after = folder / "killed", folder / "on"
    start = {"start": str(before / "shipped")}
    words = {
        "base": path.name,
        "output": str(after),
        "vae": {"refine_channels": 3},
        "unet": {"layers_per_block": 2, "transformer_layers_per_block": [1, 1, 2]},
        "train_vae": {**start, "learns": "decoder", "steps": 20, **PAINTED},
        "tokenizer": start,
        "train": {**start, "steps": 2},
        "few_steps": {"start": str(before / "shipped" / "turbo.safetensors"), "steps": 0},
    }
    on = folder / "on.toml"
    on.write_text(ablations.toml(words), encoding="utf-8")
    for stage in ("train_vae", "tokenizer", "train"):
        runs.finish([sys.executable, f"recipes/default_generator/{stage}.py", str(on)])
    shipped = str(after / "shipped")
    for stage in ("ship", "few_steps"):
        runs.finish([sys.executable, f"recipes/default_generator/{stage}.py", str(on), shipped])
    ours, theirs = (load_file(each / "shipped" / "turbo.safetensors") for each in (after, before))
    assert len(ours) > len(theirs)
    kept = {each.tobytes() for each in ours.values()}
    assert all(each.tobytes() in kept for each in theirs.values())
    weights = "shipped/vae/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(after / weights), load_file(before / weights)
    assert ours.keys() - theirs.keys() == {
        f"refine.{name}.{kind}" for name in ("conv_in", "conv_out") for kind in ("weight", "bias")
    }
    for name, values in theirs.items():
        same = np.array_equal(values, ours[name][: len(values)])
        assert same == name.startswith(("encoder.", "quant_conv.")), name
