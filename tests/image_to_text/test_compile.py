"""A compiled captioner: the same words, few compilations, none anew for longer captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import call
from diptych import Captioner
from diptych.errors import BadInput, UnsupportedModel
from tiny_models import make_captioner

torch = pytest.importorskip("torch")

PICTURES = [np.full((40, 40, 3), level, np.uint8) for level in (0, 90, 200)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    torch._dynamo.reset()
    make_captioner(tmp_path / "checkpoint", 0)
    yield tmp_path / "checkpoint"
    torch._dynamo.reset()


@pytest.mark.no_cover
def test_the_same_words(folder: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    from diptych.runtimes.on_torch_compiled import compile_captioner

    captioner = Captioner.load(folder, runtime="torch", device="cpu", dtype="float32")
    words = {"max_new_tokens": 8, "min_length": 9}
    plain = [each.token_ids for each in captioner.caption(PICTURES, **words)]
    counter, modules = CompileCounter(), captioner.networks.modules
    assert modules is not None
    layers = compile_captioner(modules["captioner"], backend=counter)
    assert layers == 4  # two of each
    assert [each.token_ids for each in captioner.caption(PICTURES, **words)] == plain
    first = counter.frame_count
    assert first > 0
    longer = captioner.caption(PICTURES, max_new_tokens=14, min_length=15)
    assert all(each.token_ids[:8] == own[:8] for each, own in zip(longer, plain, strict=True))
    assert counter.frame_count == first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_inductor_says_the_same(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    captioner = Captioner.load(folder, runtime="torch", device="cpu", dtype="float32")
    words = {"max_new_tokens": 8, "min_length": 9}
    plain = [each.token_ids for each in captioner.caption(PICTURES, **words)]
    captioner.compile()
    with caplog.at_level("WARNING", logger="diptych"):
        assert [each.token_ids for each in captioner.caption(PICTURES, **words)] == plain
    assert not caplog.records, "it ran without being compiled"


def test_what_cannot_be_compiled(folder: Path) -> None:
    captioner = Captioner.load(folder, runtime="torch", device="cpu")
    with pytest.raises(BadInput, match="captioners compile in mode None or 'default'"):
        captioner.compile("reduce-overhead")
    with pytest.raises(UnsupportedModel, match="which compiles by itself"):
        Captioner.load().compile()


def test_the_flag(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(Captioner, "compile", lambda self, mode: asked.append(mode))
    photo = Path(__file__).parents[2] / "examples" / "photos" / "coffee.jpg"
    done = call(monkeypatch, capsys, "caption", photo, "-m", folder, "--compile", "default")
    assert done.code == 0, done.err
    assert asked == ["default"]
