"""Compiled blocks: the same picture, few compilations, and none for a LoRA that is swapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych import ImageGenerator
from diptych.errors import BadInput, UnsupportedModel
from tiny_pipelines import LAYER, make_pipeline, write_lora

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

WORDS: dict[str, Any] = {"seed": 4, "num_inference_steps": 1, "width": 64, "height": 64}
# Each kind of block twice or more: once in a level would be compiled for every block.
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture
def generator(tmp_path: Path) -> Iterator[ImageGenerator]:
    torch._dynamo.reset()
    make_pipeline(tmp_path / "sd1", "sd1", 1, **TWO_LEVELS)
    yield ImageGenerator.load(tmp_path / "sd1", runtime="torch", device="cpu", dtype="float32")
    torch._dynamo.reset()


def draw(generator: ImageGenerator) -> np.ndarray:
    return np.asarray(generator.generate("a fox", **WORDS).image, np.float32)


@pytest.mark.no_cover  # the compiler reads bytecode for long, and much longer traced
def test_compiled_blocks_draw_the_same_and_swap_loras(
    generator: ImageGenerator, tmp_path: Path
) -> None:
    """The backend only counts: what is tested is what torch.compile is asked to compile."""
    from torch._dynamo.testing import CompileCounter

    from diptych.runtimes.on_torch_compiled import compile_generator

    plain = draw(generator)
    counter = CompileCounter()
    modules = generator.networks.modules
    assert modules is not None
    blocks = compile_generator(modules, backend=counter, fullgraph=True)
    assert np.abs(draw(generator) - plain).max() <= 1
    first = counter.frame_count
    assert 0 < first < blocks  # kinds, not blocks
    draw(generator)
    assert counter.frame_count == first
    width = modules["unet"].get_submodule(LAYER).weight.shape[0]
    pictures = []
    for seed in (1, 2):
        lora = write_lora(tmp_path / f"{seed}.safetensors", seed, width)
        handle = generator.load_lora(lora, fused=True)
        pictures.append(draw(generator))
        if seed == 1:
            with_lora = counter.frame_count
        assert counter.frame_count == with_lora
        handle.set_scale(0.5)
        draw(generator)
        generator.unload_lora(handle)
    assert np.abs(draw(generator) - plain).max() <= 1
    assert counter.frame_count == with_lora
    assert len({picture.tobytes() for picture in pictures}) == 2


@pytest.mark.no_cover
def test_where_the_compiler_fails_pictures_are_made_without_it(
    generator: ImageGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    from diptych.runtimes.on_torch_compiled import compile_generator

    asked = []

    def broken(*_: Any) -> Any:
        asked.append(1)
        try:
            raise OSError("no kernel for this\nand much more")
        except OSError as error:
            raise ValueError("at 51:26:") from error

    plain, modules = draw(generator), generator.networks.modules
    assert modules is not None
    compile_generator(modules, backend=broken)
    with caplog.at_level("WARNING", logger="diptych"):
        assert (draw(generator) == plain).all()
        draw(generator)
    assert len(asked) == 1, "no other block is tried in vain"
    [told] = [record.getMessage() for record in caplog.records if record.name == "diptych"]
    assert told.startswith("torch.compile failed")
    assert told.endswith(": OSError: no kernel for this")


def test_mistakes_of_a_block_are_no_failures_of_the_compiler(generator: ImageGenerator) -> None:
    from diptych.runtimes.on_torch_compiled import compile_generator

    modules = generator.networks.modules
    assert modules is not None
    compile_generator(modules, backend="eager")
    with pytest.raises(RuntimeError, match="channels"):
        generator.networks["vae_decoder"](latents=np.zeros((1, 7, 8, 8), np.float32))


def test_what_cannot_be_compiled(generator: ImageGenerator) -> None:
    with pytest.raises(BadInput, match="mode is 'fast'"):
        generator.compile("fast")
    with pytest.raises(UnsupportedModel, match="which compiles by itself"):
        ImageGenerator.load().compile()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_inductor_draws_the_same(
    generator: ImageGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    plain = draw(generator)
    generator.compile()
    with caplog.at_level("WARNING", logger="diptych"):
        assert np.abs(draw(generator) - plain).max() <= 1
    assert not caplog.records, "it was drawn without being compiled"
