"""LoRA files and learned words in a generator, through whole pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych import ImageGenerator
from diptych.errors import BadInput, WeightsMismatch
from tiny_pipelines import make_pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

WORDS: dict[str, Any] = {"seed": 4, "num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> ImageGenerator:
    folder = tmp_path_factory.mktemp("sd1")
    make_pipeline(folder, "sd1", 1)
    return ImageGenerator.load(folder, runtime="torch", device="cpu", dtype="float32")


def write_lora(path: Path, seed: int, layer: str = "mid_block.attentions.0.proj_in") -> Path:
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    save_file(
        {
            f"unet.{layer}.lora_A.weight": torch.randn(2, 64, 1, 1, generator=random),
            f"unet.{layer}.lora_B.weight": torch.randn(64, 2, 1, 1, generator=random),
        },
        path,
    )
    return path


@pytest.mark.parametrize("fused", [False, True])
def test_loras_add_up_and_leave_no_trace(
    generator: ImageGenerator, tmp_path: Path, fused: bool
) -> None:
    one, two = (write_lora(tmp_path / f"{name}.safetensors", seed) for name, seed in NAMES)
    plain = generator.generate("a fox", **WORDS)
    first = generator.load_lora(one, 0.5, fused=fused)
    with_one = generator.generate("a fox", **WORDS)
    generator.load_lora(two, fused=fused)
    with_both = generator.generate("a fox", **WORDS)
    assert len({p.image.tobytes() for p in (plain, with_one, with_both)}) == 3
    assert with_both.model.endswith(" + ink:0.5 + oil:1")
    first.set_scale(0.0)
    generator.unload_lora(first)
    generator.unload_lora()
    after = generator.generate("a fox", **WORDS)
    assert after.image.tobytes() == plain.image.tobytes() and after.model == plain.model


NAMES = (("ink", 1), ("oil", 2))


def test_a_foreign_lora_changes_nothing(generator: ImageGenerator, tmp_path: Path) -> None:
    plain = generator.generate("a fox", **WORDS)
    foreign = write_lora(tmp_path / "a.safetensors", 1, "mid_block.attentions.7.proj_in")
    with pytest.raises(WeightsMismatch, match="no place"):
        generator.load_lora(foreign)
    assert generator.generate("a fox", **WORDS).image.tobytes() == plain.image.tobytes()


def test_a_learned_word(generator: ImageGenerator, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "word.safetensors"
    save_file({"<sketch>": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, path)
    plain = generator.generate("a <sketch> fox", **WORDS)
    assert generator.load_textual_inversion(path) == "<sketch>"
    taught = generator.generate("a <sketch> fox", **WORDS)
    assert taught.image.tobytes() != plain.image.tobytes()
    with pytest.raises(BadInput, match="already"):
        generator.load_textual_inversion(path)
    assert generator.load_textual_inversion(path, "fancy") == "fancy"
    same = np.asarray(generator.generate("a fancy fox", **WORDS).image, float)
    assert np.abs(same - np.asarray(taught.image, float)).max() <= 1
    generator.unload_textual_inversion()
    assert generator.generate("a <sketch> fox", **WORDS).image.tobytes() == plain.image.tobytes()


def test_a_handle_takes_its_lora_out_of_the_recipe_too(
    generator: ImageGenerator, tmp_path: Path
) -> None:
    plain = generator.generate("a fox", **WORDS)
    handle = generator.load_lora(write_lora(tmp_path / "ink.safetensors", 1))
    state = generator._adapters.state
    assert generator.generate("a fox", **WORDS).model == plain.model + " + ink:1"
    handle.remove()
    assert generator._adapters.state != state
    after = generator.generate("a fox", **WORDS)
    assert after.image.tobytes() == plain.image.tobytes() and after.model == plain.model
    # Another one is never taken for it, wherever it lies in memory.
    again = generator.load_lora(write_lora(tmp_path / "ink.safetensors", 2))
    assert generator._adapters.state != state
    generator.unload_lora(again)
