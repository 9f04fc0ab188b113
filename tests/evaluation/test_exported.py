"""The judge of a smaller captioner: CIDEr-D before and after, and a bound."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diptych.errors import QualityLoss
from diptych.evaluation import exported
from diptych.evaluation.caption_metrics import score_captions
from diptych.evaluation.captions import Described
from diptych.weights.diffusion import resolve_generator
from diptych.weights.hub import resolve

WRITTEN = [("a dog runs on the grass",), ("two people sit on a bench",)]


def test_loss_is_told_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve("default")
    said = {
        "fp32": ["a dog runs on grass", "two people sit on a bench"],
        "int8": ["a cat", "two people sit on a bench"],
    }
    monkeypatch.setattr(
        exported, "_caption_all", lambda model, described: said[model.precision or ""]
    )
    before, after = (dataclasses.replace(model, precision=each) for each in ("fp32", "int8"))
    described = [Described(Path(f"{i}.png"), texts) for i, texts in enumerate(WRITTEN)]
    with pytest.raises(QualityLoss, match=r"int8 costs \d+\.\d% of CIDEr-D"):
        exported.caption_judge(described)(before, after)
    found = exported.caption_judge(described, force=True)(before, after)
    scores = [score_captions(said[each], WRITTEN).cider_d for each in ("fp32", "int8")]
    assert found["relative_loss"] == pytest.approx((scores[0] - scores[1]) / scores[0])
    assert (found["identical"], found["pictures"]) == (1, 2)
    same = exported.caption_judge(described)(before, before)
    assert same["relative_loss"] == 0
    assert same["identical"] == 2


def test_a_generator_is_judged_by_what_it_draws() -> None:
    model = resolve_generator("default")
    found = exported.picture_judge(2)(model, model)
    assert (found["pictures"], found["worst_psnr_db"], found["ssim"]) == (2, 200.0, 1.0)
    assert found["adherence"] == found["adherence_before"]
    assert 0 <= found["adherence"]["object + colour"] <= 1
    turbo = resolve_generator("default-turbo")
    other = exported.picture_judge(2)(model, turbo)
    assert other["psnr_db"] < 30 and other["ssim"] < 0.99
    # Others draw no scenes: it would say little, and take long.
    assert exported.picture_judge()(dataclasses.replace(model, family="sd1"), model) == {}
