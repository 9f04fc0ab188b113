"""The sweep finds the matrices that bear rounding badly, and the choice follows the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diptych
from diptych.errors import QualityLoss
from diptych.runtimes.agreement import pictures_for
from diptych.runtimes.quantize import Bits, unit_of
from diptych.runtimes.sensitivity import Unit, spare, squeeze, sweep
from diptych.runtimes.smaller_captioner import Shrinking, check_bound, quantize_captioner
from diptych.weights.files import ModelFolder, describe

Make = Callable[..., Any]


def test_a_planted_unit_is_found(module: Make, export: Make, tmp_path: Path) -> None:
    """Numbers of very different sizes in a block, where no scale fits: that unit costs most."""
    captioner = module("cross-attention")
    with torch.no_grad():
        weight = captioner.decoder.h[1].mlp.c_fc.weight
        weight[:, ::8] *= 60
    export(captioner, tmp_path / "a")
    model = describe(tmp_path / "a")
    images = pictures_for(model.config, model.preprocessing, None, 4)
    units = sweep(model.networks, images, model.config, model.generation, 4)
    assert units[0].name == "decoder.h.1.mlp"
    assert units[0].divergence > 2 * units[1].divergence
    names = [unit.name for unit in units]
    assert len(names) == len(set(names))
    assert {"encoder.encoder.layer.0.attention", "decoder.h.0.crossattention"} <= set(names)
    assert all(unit.numbers > 0 for unit in units)


def test_more_bits_cost_less(module: Make, export: Make, tmp_path: Path) -> None:
    export(module("prefix"), tmp_path / "a")
    model = describe(tmp_path / "a")
    images = pictures_for(model.config, model.preprocessing, None, 2)
    total = {
        bits: sum(
            unit.divergence
            for unit in sweep(model.networks, images, model.config, model.generation, bits)
        )
        for bits in (8, 4, 2)
    }
    assert total[8] < total[4] < total[2]


def test_room_goes_to_those_that_gain_most() -> None:
    units = [Unit("a", 9.0, 1000), Unit("b", 5.0, 100), Unit("c", 0.1, 10), Unit("d", 0.1, 10)]
    assert spare(Bits(4), units, 0).units == {}
    assert spare(Bits(4), units, 50).units == {"b": 8}
    assert spare(Bits(4), units, 10_000).units == {"a": 8, "b": 8}
    assert spare(Bits(4), [], 10).units == {}


def test_excess_comes_from_those_that_lose_least() -> None:
    units = [Unit("a", 9.0, 1000), Unit("b", 5.0, 100), Unit("c", 0.1, 40)]
    assert squeeze(Bits(4), units, 10).units == {"c": 2}
    assert squeeze(Bits(4), units, 11).units == {"c": 2, "a": 2}
    assert squeeze(Bits(4), units, 0).units == {}


def test_units_are_attention_or_mlp_of_a_layer() -> None:
    assert unit_of("decoder.h.11.crossattention.c_attn.weight.768") == (
        "decoder.h.11.crossattention"
    )
    assert unit_of("encoder.encoder.layer.3.attention.query.weight") == (
        "encoder.encoder.layer.3.attention"
    )
    assert unit_of("bridge.projection.weight") == "bridge.projection.weight"
    bits = Bits(4, units={"decoder.h.0.mlp": 8})
    assert bits.of("decoder.h.0.mlp.c_fc.weight") == 8
    assert bits.of("decoder.h.0.attn.c_attn.weight") == 4
    assert bits.of("decoder.wte.weight") == 8


def test_a_great_loss_is_no_export(artifacts: Make, tmp_path: Path) -> None:
    tokens = {"images": 20, "identical": 18, "tokens": 200, "agreeing": 30}
    check_bound({"tokens": tokens}, Shrinking(mode="int4", images=[]))
    with pytest.raises(QualityLoss, match="only 90% of the captions are the same in int8"):
        check_bound({"tokens": tokens}, Shrinking(mode="int8", images=[]))
    with pytest.raises(QualityLoss, match="only 15% of the words are the same on seeded"):
        check_bound({"tokens": tokens}, Shrinking(mode="int8"))
    check_bound({"tokens": tokens}, Shrinking(mode="int8", force=True))


def test_an_artifact_alone_is_judged_as_well(artifacts: Make, tmp_path: Path) -> None:
    """One that came without its checkpoint: it was made smaller unjudged."""

    def refuse(before: ModelFolder, after: ModelFolder) -> dict[str, Any]:
        assert (before.precision, after.precision) == ("fp32", "int8")
        raise QualityLoss("worse")

    source = artifacts("prefix") / "fp32"
    with pytest.raises(QualityLoss, match="worse"):
        diptych.export(source, tmp_path / "a", quantize="int8", judge=refuse)
    assert not [*tmp_path.iterdir()]
    report = diptych.export(source, tmp_path / "a", quantize="int8", judge=lambda *_: {"lost": 0})
    assert report["int8"]["judged"] == {"lost": 0}


def test_nothing_is_left_of_a_refused_export(
    artifacts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych.runtimes import smaller_captioner

    monkeypatch.setitem(smaller_captioner._BOUNDS, "int4", (1.1, 1.1))
    with pytest.raises(QualityLoss):
        quantize_captioner(artifacts("prefix") / "fp32", tmp_path / "a", "int4")
    assert not [*tmp_path.iterdir()]
    quantize_captioner(artifacts("prefix") / "fp32", tmp_path / "a", "int4", force=True)
    assert describe(tmp_path / "a").precision == "int4"
