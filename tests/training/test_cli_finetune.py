"""The command line of fine-tuning, on small random models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diptych.cli import app
from diptych.errors import BadInput, DiptychError, MissingExtra
from diptych.runtimes import network
from tiny_models import make_captioner
from training_pictures import draw_pictures

RUNNER = CliRunner()


def run(*words: object) -> Any:
    return RUNNER.invoke(app, [str(word) for word in words], standalone_mode=False)


def generator(data: Path, model: Path, folder: Path, *more: object) -> Any:
    return run(
        *("finetune", "generator", data, "--model", model, "--method", "lora"),
        *("--max-train-steps", 4, "--learning-rate", 1e-3, "--resolution", 64),
        *("--checkpointing-steps", 2, "--seed", 5, "--device", "cpu", "--output", folder),
        *("--train-batch-size", 2, "--num-sample-images", 0, *more),
    )


@pytest.mark.parametrize("panel", ["generator", "captioner"])
def test_the_help_tells_defaults_that_are_zero(panel: str) -> None:
    said = " ".join(run("finetune", panel, "--help").stdout.split())
    for option, default in {"seed": "0", "lr-warmup-steps": "0", "ema-decay": "0.0"}.items():
        own = said.split(f"--{option} ")[1].split(" --")[0]
        assert own.endswith(f"[default: ({default})]")


def test_a_lora_is_trained_where_it_should_lie(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    result = generator(
        pictures,
        sd1,
        tmp_path,
        "--sample-prompts",
        "a",
        "--sample-prompts",
        "b",
        "--sample-steps",
        4,
    )
    assert result.exception is None, result.output
    assert result.stdout.split() == [str(tmp_path / "pytorch_lora_weights.safetensors")]
    assert "validation loss" in result.stderr
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("cache", "checkpoints", "dataset.json", "metrics.jsonl", "report.html", "run.json"),
        "pictures.json",
        *("pytorch_lora_weights.safetensors", "samples"),
    }
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/webp") == 2 * 2  # at the start and at the end
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "samples" / "prompts.txt").read_text() == "a\nb\n"
    # Without a word about runtimes, a picture is drawn with it.
    drawn = run(
        *("generate", "a red bird", "--model", sd1, "--lora", tmp_path, "--steps", 2),
        *("--width", 64, "--height", 64, "--output", tmp_path / "x.png"),
    )
    assert drawn.exception is None, drawn.output
    assert (tmp_path / "x.png").is_file()


def test_it_goes_on_where_it_was(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    assert generator(pictures, sd1, tmp_path).exception is None
    again = generator(pictures, sd1, tmp_path)
    assert isinstance(again.exception, BadInput)
    assert "is at step 4: resume it" in str(again.exception)
    longer = generator(pictures, sd1, tmp_path, "--resume", "--max-train-steps", 6, "-f", "json")
    assert longer.exception is None
    assert json.loads(longer.stdout)["step"] == 6


def test_a_picture_that_went_is_named(tmp_path: Path, sd1: Path) -> None:
    data = draw_pictures(tmp_path / "data", 6, seed=3)
    assert generator(data, sd1, tmp_path / "run").exception is None
    kept = (data / "002.png").read_bytes()
    (data / "002.png").unlink()
    again = generator(data, sd1, tmp_path / "run", "--resume", "--max-train-steps", 6)
    assert isinstance(again.exception, BadInput)
    assert "002.png is gone" in str(again.exception)
    (data / "002.png").write_bytes(kept)
    last = generator(data, sd1, tmp_path / "run", "--resume", "--max-train-steps", 6)
    assert last.exception is None


def test_a_dry_run_only_looks(tmp_path: Path, pictures: Path) -> None:
    result = run("finetune", "generator", pictures, "--dry-run")
    assert result.exception is None
    assert "12 pictures found" in result.stdout
    result = run("finetune", "captioner", pictures, "--dry-run", "-f", "json")
    report = json.loads(result.stdout)
    assert report["found"] == 12
    assert report["train"] + report["validation"] == 12


def test_pictures_without_captions_are_captioned(tmp_path: Path, sd1: Path) -> None:
    data = draw_pictures(tmp_path / "data", 3, seed=2)
    (data / "metadata.jsonl").unlink()
    refused = generator(data, sd1, tmp_path / "run")
    assert "caption_with" in str(refused.exception)
    result = generator(data, sd1, tmp_path / "run", "--caption-with", "default")
    assert result.exception is None, result.output
    rows = (tmp_path / "run" / "captions.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert all(json.loads(row)["text"] for row in rows)


def test_a_captioner_is_trained(tmp_path: Path, pictures: Path) -> None:
    make_captioner(tmp_path / "model", 5)
    result = run(
        *("finetune", "captioner", pictures, "--model", tmp_path / "model", "--freeze", "encoder"),
        *("--max-train-steps", 3, "--output", tmp_path / "run", "--quiet"),
    )
    assert result.exception is None, result.output
    model = tmp_path / "run" / "model"
    assert result.stdout.split() == [str(model)]
    said = run("caption", pictures / "000.png", "--model", model, "--max-length", 6)
    assert said.exception is None
    assert said.stdout.strip()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rank", "0"), "rank is 0"),
        (("--method", "magic"), "method is 'magic'"),
        (("--lora-layers", "nothing"), "names no layer"),
        (("--optimizer", "adamw_8bit"), "pip install bitsandbytes"),
        (("--device", "cuda:99"), "cannot be used here"),
    ],
)
def test_bad_words_get_one_sentence(
    tmp_path: Path, sd1: Path, pictures: Path, words: tuple[str, ...], told: str
) -> None:
    result = generator(pictures, sd1, tmp_path, *words)
    assert isinstance(result.exception, DiptychError)
    assert told in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_run_is_no_part_of_its_data(sd1: Path, pictures: Path) -> None:
    result = generator(pictures, sd1, pictures / "run")
    assert "lies within the data" in str(result.exception)
    assert not (pictures / "run").exists()


def test_no_output_is_asked_for(pictures: Path) -> None:
    result = run("finetune", "generator", pictures)
    assert "--output" in str(result.exception)


@pytest.mark.parametrize("panel", ["generator", "captioner"])
def test_without_torch_the_extra_of_the_guides_is_named(
    panel: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    result = run("finetune", panel, pictures, "--dry-run")
    assert isinstance(result.exception, MissingExtra)
    assert result.exception.extra == "train"


def test_evaluate_draws_with_a_lora(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    assert generator(pictures, sd1, tmp_path).exception is None
    words = ("evaluate", "images", "--model", sd1, "--count", 2, "--steps", 1, "-f", "json")
    size = ("--width", 64, "--height", 64)
    result = run(*words, *size, "--lora", tmp_path)
    assert result.exception is None, result.output
    assert json.loads(result.stdout)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    """As `torchrun` and `accelerate launch` start them."""
    from safetensors.torch import load_file

    alone, together = tmp_path / "alone", tmp_path / "together"
    # Larger than elsewhere: maps of one point, normalised by themselves, only amplify rounding.
    more = ("--train-batch-size", 4, "--resolution", 128)
    assert generator(pictures, sd1, alone, *more).exception is None
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", "29617", "-m", "diptych", "finetune", "generator", str(pictures)),
        *("--model", str(sd1), "--max-train-steps", "4", "--learning-rate", "1e-3"),
        *("--resolution", "128", "--checkpointing-steps", "2", "--seed", "5", "--device", "cpu"),
        *("--output", str(together), "--train-batch-size", "4"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("diptych: ")]
    assert done.returncode == 0, told
    one, two = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (alone, together)
    )
    assert one.keys() == two.keys()
    # Sums in another order, of which Adam makes much where a gradient is nearly 0.
    names = [name for name in one if "lora_B" in name]  # they began as 0
    way = sum(float(one[name].square().sum()) for name in names) ** 0.5
    gap = sum(float((one[name] - two[name]).square().sum()) for name in names) ** 0.5
    assert gap < 0.05 * way


def test_a_run_goes_on_when_nobody_listens(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    """As in `diptych finetune … 2>&1 | head -1`."""
    from diptych.training import finetune
    from diptych.training.options import GeneratorTrainOptions

    def gone(*_: object) -> None:
        raise BrokenPipeError

    options = GeneratorTrainOptions(
        method="lora", max_train_steps=2, resolution=64, num_sample_images=0, train_batch_size=2
    )
    finished = finetune.finetune_generator(
        pictures,
        tmp_path / "run",
        sd1,
        options,
        device="cpu",
        reporting=finetune.Reporting(tell=gone, note=gone, advance=lambda _: gone),
    )
    assert finished.step == 2 and all(path.is_file() for path in finished.files)


def test_captions_are_drawn_as_they_stand(tmp_path: Path, sd1: Path) -> None:
    """Brackets of a caption weigh nothing, and end no run."""
    folder = draw_pictures(tmp_path / "pictures", 3, seed=4)
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    text = "a crowd (ISO: 400) [2:3]"
    table.write_text("".join(json.dumps({**row, "text": text}) + "\n" for row in rows))
    result = generator(folder, sd1, tmp_path / "run", "--num-sample-images", 1)
    assert result.exception is None, result.output
    assert (tmp_path / "run" / "samples" / "prompts.txt").read_text() == f"{text}\n"
