import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diptych.cli import app
from diptych.errors import BadInput, DiptychError
from diptych.evaluation.scenes import evaluation_prompts

RENDER = Path(__file__).parents[2] / "recipes/scenes/render.py"


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("scene_render_for_cli", RENDER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.render
    del sys.modules[spec.name]


@pytest.fixture
def drawn(render, tmp_path):
    """Write ten true drawings of ten prompts, the last two exchanged."""
    rng = np.random.default_rng(0)
    prompts = evaluation_prompts(10)
    pictures = [render(each.scene, rng)[0] for each in prompts]
    pictures[-2:] = pictures[:-3:-1]
    lines = []
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        picture.save(tmp_path / f"{number}.png")
        row = {"file": f"{number}.png", "prompt": prompt.prompt, "task": prompt.task}
        lines.append(json.dumps(row))
    path = tmp_path / "pictures.jsonl"
    path.write_text("\n".join(lines))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", "images", *map(str, arguments)])


def test_pictures_from_files_are_judged(drawn):
    result = run(drawn, "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["overall"]["everything"]["share"] == 0.8
    assert found["tasks"]["single object"]["share"] == 1.0
    assert found["tasks"]["single object"]["pictures"] == 2


def test_the_table_states_chance_and_interval(drawn):
    text = run(drawn).stdout
    assert "single object" in text and "all: object + colour" in text
    assert "wrong prompts" in text and "95 % interval" in text
    assert "80.0%" in text and "25.0%" in text


def test_what_was_saved_is_read_back(drawn, tmp_path):
    first = run(drawn, "--save-images", tmp_path / "kept", "--format", "json")
    kept = (tmp_path / "kept/pictures.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in kept]
    assert [row["passed"] for row in rows].count(False) == 2
    again = run(tmp_path / "kept/pictures.jsonl", "--format", "json")
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_a_missing_picture_is_told_and_the_others_judged(drawn):
    (drawn.parent / "0.png").unlink()
    result = run(drawn, "--format", "json")
    assert result.exit_code == 3
    assert "0.png" in result.stderr
    assert json.loads(result.stdout)["overall"]["everything"]["share"] == pytest.approx(0.7)


def test_no_picture_at_all_is_an_error(tmp_path):
    path = tmp_path / "pictures.jsonl"
    path.write_text('{"file": "a.png", "prompt": "a red circle"}')
    assert isinstance(run(path).exception, BadInput)


class FakeGenerator:
    """Draw what the prompt says, but nothing but the first prompt for a `blind` one."""

    def __init__(self, render, blind=False, broken=()):
        self.render, self.blind, self.broken = render, blind, broken
        self.asked = None

    def images(self, prompts, options, *, batch_size):
        from diptych.evaluation.scenes import parse_sentence
        from diptych.text_to_image.generated_image import GeneratedImage

        self.asked = (list(prompts), options, batch_size)
        for number, prompt in enumerate(prompts):
            scene = parse_sentence(prompts[0] if self.blind else prompt)
            seed = options.seed + number
            picture, _ = self.render(scene, np.random.default_rng(seed))
            error = DiptychError("no") if number in self.broken else None
            yield GeneratedImage(picture, seed, prompt, options, "fake", error=error)


def generate_with(monkeypatch, generator, *arguments):
    from diptych.text_to_image.generator import ImageGenerator

    monkeypatch.setattr(ImageGenerator, "load", lambda *_, **__: generator)
    return run(*arguments, "--format", "json")


def test_a_model_draws_the_held_out_prompts(monkeypatch, render):
    generator = FakeGenerator(render)
    result = generate_with(
        monkeypatch, generator, "--count", 15, "--num-inference-steps", 3, "--batch-size", 4
    )
    assert result.exit_code == 0, result.output
    prompts, options, batch_size = generator.asked
    assert prompts == [each.prompt for each in evaluation_prompts(15)]
    assert (options.seed, options.num_inference_steps, batch_size) == (0, 3, 4)
    assert json.loads(result.stdout)["overall"]["everything"]["share"] == 1.0


def test_a_model_that_ignores_the_prompt_scores_little(monkeypatch, render):
    result = generate_with(monkeypatch, FakeGenerator(render, blind=True), "--count", 30)
    assert json.loads(result.stdout)["overall"]["everything"]["share"] < 0.2


def test_several_pictures_a_prompt_are_all_judged(monkeypatch, render):
    generator = FakeGenerator(render)
    arguments = ("--count", 5, "--num-images-per-prompt", 2, "--seed", 7)
    result = generate_with(monkeypatch, generator, *arguments)
    assert json.loads(result.stdout)["overall"]["everything"]["pictures"] == 10
    prompts, options, _ = generator.asked
    assert prompts[0] == prompts[1] and options.seed == 7


def test_a_picture_that_fails_counts_as_wrong(monkeypatch, render):
    result = generate_with(monkeypatch, FakeGenerator(render, broken=(3,)), "--count", 10)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["overall"]["everything"]["share"] == 0.9


def test_pictures_that_cannot_be_kept_do_not_cost_the_scores(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    path = tmp_path / "pictures.jsonl"
    path.write_text('{"file": "a.png", "prompt": "a red circle"}')
    (tmp_path / "out" / "0000.png").mkdir(parents=True)
    done = run(path, "--save-images", tmp_path / "out", "--format", "json")
    assert done.exit_code == 3, done.output
    assert "0000.png: cannot be written" in done.stderr
    found = json.loads(done.stdout)  # strictly: NaN would be no JSON elsewhere
    assert found["tasks"]["single object"]["chance_dealt"] is None
    assert "NaN" not in done.stdout
