"""Deep features used again: which steps compute them, what the others get. And merged tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych import ImageGenerator
from diptych.errors import BadInput, UnsupportedModel
from diptych.text_to_image.denoiser import build_denoiser
from diptych.text_to_image.reuse import FeatureReuse
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from fake_generator import make_generator
from tiny_pipelines import make_pipeline

WORDS = {"seed": 4, "num_inference_steps": 5, "guidance_scale": 3.0, "sampler": "euler"}


class Whole:
    """Give features that tell which call made them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, wanted: Any = None, /, **inputs: Any) -> Any:
        assert wanted == ("noise_pred", "deep_features")
        self.calls.append(("whole", len(inputs["latents"])))
        return inputs["latents"] * 0, np.full((len(inputs["latents"]), 1, 1, 1), len(self.calls))

    def shallow(self, *, deep_features: Any, **inputs: Any) -> Any:
        self.calls.append((f"of call {deep_features[0, 0, 0, 0]}", len(inputs["latents"])))
        return (inputs["latents"] * 0,)


def walk(count: int, interval: int, **words: Any) -> list[tuple[str, int]]:
    network, steps = Whole(), NoiseSchedule(ScheduleConfig()).steps("euler", count)
    told = {"encoder_hidden_states": np.zeros((1, 3, 4), np.float32)}
    reuse = FeatureReuse(network, network.shallow, interval)
    denoise = build_denoiser(
        *(network, steps, told),
        negative={"encoder_hidden_states": np.ones((1, 3, 4), np.float32)},
        guidance_scale=2.0,
        reuse=reuse,
        **words,
    )
    for sigma in steps.sigmas[:-1]:
        denoise(np.zeros((1, 4, 2, 2), np.float32), sigma)
    return network.calls


def test_every_nth_step_is_whole() -> None:
    assert walk(5, 2) == [
        ("whole", 2),
        ("of call 1", 2),
        ("whole", 2),
        ("of call 3", 2),
        ("whole", 2),
    ]
    assert [name for name, _ in walk(7, 3)] == [
        "whole", "of call 1", "of call 1", "whole", "of call 4", "of call 4", "whole",
    ]  # fmt: skip
    assert [name for name, _ in walk(3, 1)] == ["whole"] * 3


def test_rows_that_run_one_by_one_keep_their_own() -> None:
    assert walk(3, 2, one_by_one=True) == [
        ("whole", 1), ("whole", 1), ("of call 1", 1), ("of call 2", 1), ("whole", 1), ("whole", 1),
    ]  # fmt: skip


def test_rows_that_guidance_adds_are_computed_at_first() -> None:
    found = walk(10, 4, guidance_interval=(0.3, 0.6))
    assert found == [
        ("whole", 1), ("of call 1", 1), ("of call 1", 1),
        ("whole", 2), ("of call 4", 2), ("of call 4", 2),
        ("whole", 1), ("of call 7", 1), ("of call 7", 1), ("of call 7", 1),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    checkpoint, artifact = (tmp_path_factory.mktemp(name) for name in ("checkpoint", "artifact"))
    make_pipeline(checkpoint, "sd1", 0)
    ImageGenerator.load(checkpoint).export(artifact / "new")
    return checkpoint, artifact / "new"


def test_a_run_is_a_loop_by_hand(folders: tuple[Path, Path]) -> None:
    generator = ImageGenerator.load(folders[0])
    plain = generator.generate("a red door", **WORDS)
    one = generator.generate("a red door", reuse_interval=1, **WORDS)
    assert one.image.tobytes() == plain.image.tobytes()

    unet = generator.networks.modules["unet"]
    ids = [[generator.tokenizers["tokenizer"].encode(text)] for text in ("", "a red door")]
    encode = generator.networks["text_encoder"]
    words = torch.cat([encode(input_ids=np.array(each), clip_skip=0)[0] for each in ids])
    grid = generator.schedule.steps("euler", 5)
    noise = torch.randn(1, 4, 8, 8)
    latents, deep = noise * grid.initial_scale, None
    run = generator.denoising_steps("a red door", latents=noise, reuse_interval=3, **WORDS)
    for index, step in enumerate(run):
        sigma = grid.sigmas[index]
        fed = torch.cat([latents / (sigma**2 + 1) ** 0.5] * 2)
        time = torch.full((2,), grid.timesteps[index])
        with torch.no_grad():
            given = None if index % 3 == 0 else deep
            output, deep = unet.predict(fed, time, words, deep_features=given)
            differs = not torch.allclose(output, unet(fed, time, words), atol=1e-4)
        assert differs == (index % 3 != 0)
        expected = latents - (output[:1] + (output[1:] - output[:1]) * 3.0) * sigma
        torch.testing.assert_close(step.denoised, expected, atol=1e-3, rtol=1e-3)
        latents = step.latents


def test_tokens_are_merged_in_torch_only(folders: tuple[Path, Path]) -> None:
    generator, onnx = (ImageGenerator.load(folder) for folder in folders)
    plain = generator.generate("a red door", **WORDS)
    none = generator.generate("a red door", token_merging_ratio=0.0, **WORDS)
    some = generator.generate("a red door", token_merging_ratio=0.5, reuse_interval=2, **WORDS)
    assert none.image.tobytes() == plain.image.tobytes() != some.image.tobytes()
    with pytest.raises(UnsupportedModel, match="token_merging_ratio needs runtime='torch'"):
        onnx.generate("a red door", token_merging_ratio=0.5, **WORDS)


def test_onnx_files_draw_the_same(folders: tuple[Path, Path]) -> None:
    ours, onnx = ImageGenerator.load(folders[0]), ImageGenerator.load(folders[1])
    assert onnx.networks.runtime == "onnxruntime"
    pictures = [
        np.asarray(each.generate("a red door", reuse_interval=2, **WORDS).image, int)
        for each in (ours, onnx)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_files_of_older_exports_are_told() -> None:
    generator = make_generator()
    assert generator.generate("red").options.reuse_interval == 1
    with pytest.raises(UnsupportedModel, match=r"fake has no unet_shallow\.onnx.*export it anew"):
        generator.generate("red", reuse_interval=2)
    with pytest.raises(BadInput, match="reuse_interval is not for style_transfer"):
        generator.style_transfer("a.png", "b.png", reuse_interval=2)
