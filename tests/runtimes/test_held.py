"""Captions whose cache is held, as on an NVIDIA GPU; `Replica` stands for its graphs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from diptych import Captioner  # noqa: E402
from diptych.runtimes.on_torch_held import HoldingDecoder, RecordedEncoder  # noqa: E402
from replicas import Replica  # noqa: E402
from tiny_models import make_captioner, make_photo  # noqa: E402

PHOTOS = [make_photo(seed) for seed in range(6)]
OPTIONS: list[dict[str, Any]] = [
    {"max_length": 20},
    {"max_length": 20, "num_beams": 4, "num_return_sequences": 2},
    {"max_length": 12, "do_sample": True, "seed": 3, "num_return_sequences": 3},
    {"max_length": 20, "num_beams": 3, "repetition_penalty": 0.7},
]


@pytest.fixture(scope="module", params=["cross-attention", "prefix"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | str:
    if request.param == "prefix":
        return "default"
    path: Path = tmp_path_factory.mktemp("held")
    make_captioner(path, 7)
    return path


@pytest.fixture
def plain(folder: Path | str) -> Captioner:
    return Captioner.load(folder, runtime="torch")


@pytest.fixture
def held(folder: Path | str) -> Captioner:
    Replica.made = 0
    return holding(Captioner.load(folder, runtime="torch"))


def holding(captioner: Captioner, record: Any = Replica) -> Captioner:
    decoder: Any = captioner.networks["decoder"]
    captioner.networks["decoder"] = HoldingDecoder(decoder._module, record)
    return captioner


def words(captions: Any) -> Any:
    return [[each.token_ids for each in (c, *c.alternatives)] for c in captions]


@pytest.mark.parametrize("options", OPTIONS)
def test_captions_stay_the_same_also_where_pictures_are_done_early(
    plain: Captioner, held: Captioner, options: dict[str, Any]
) -> None:
    expected = plain.caption(PHOTOS, batch_size=6, **options)
    lengths = {len(each.token_ids) for each in expected}
    assert len(lengths) > 1, "all end at once: nothing is shown of rows that are done"
    for _ in range(3):
        assert words(held.caption(PHOTOS, batch_size=6, **options)) == words(expected)
    assert Replica.made
    made = Replica.made
    held.caption(PHOTOS[::-1], batch_size=6, **options)
    assert Replica.made == made, "what was recorded serves other pictures"


def test_a_recorded_encoder_says_the_same(plain: Captioner) -> None:
    encoder: Any = plain.networks["encoder"]
    recorded = RecordedEncoder(encoder._module, Replica)
    Replica.made = 0
    side = plain.model.config["encoder"]["image_size"]
    for seed in range(4):
        pixels = np.random.default_rng(seed).standard_normal((2, 3, side, side), np.float32)
        (wanted,), (found,) = encoder(pixel_values=pixels), recorded(pixel_values=pixels)
        assert torch.equal(found, wanted)
    assert Replica.made == 1


def test_the_cache_grows_with_long_captions(plain: Captioner, held: Captioner) -> None:
    options = {"max_length": 40, "min_length": 36, "num_beams": 2}
    expected = words(plain.caption(PHOTOS[:2], **options))
    for _ in range(3):
        assert words(held.caption(PHOTOS[:2], **options)) == expected


def test_searches_at_once_have_a_cache_each(plain: Captioner, held: Captioner) -> None:
    options = {"max_length": 20, "min_length": 12, "num_beams": 1}
    expected = words(plain.caption(PHOTOS[:2], batch_size=1, **options))
    held.caption(PHOTOS[2], **options)
    waiting = held.stream(PHOTOS[0], **options)
    pieces = [next(waiting), next(waiting)]
    for _ in range(3):
        assert words(held.caption(PHOTOS[1:2], batch_size=1, **options)) == expected[1:]
    assert "".join([*pieces, *waiting]).strip() == plain.caption(PHOTOS[0], **options).text
    decoder: Any = held.networks["decoder"]
    gc.collect()
    assert sum(map(len, decoder._kept.values())) == 2


def test_weights_that_moved_are_read_where_they_are(plain: Captioner, held: Captioner) -> None:
    for _ in range(3):
        before = words([held.caption(PHOTOS[0], max_length=16)])
    decoder: Any = held.networks["decoder"]
    for captioner in (plain, held):
        other: Any = captioner.networks["decoder"]
        embedding = other._module.decoder.wte
        embedding.weight.data = embedding.weight.data.flip(0)
    expected = words([plain.caption(PHOTOS[0], max_length=16)])
    assert expected != before
    for _ in range(3):
        assert words([held.caption(PHOTOS[0], max_length=16)]) == expected
    gc.collect()
    assert sum(map(len, decoder._kept.values())) == 1


def test_few_kinds_of_search_are_kept(held: Captioner) -> None:
    for beams in range(1, 11):
        for _ in range(2):
            held.caption(PHOTOS[0], max_length=8, num_beams=beams)
    decoder: Any = held.networks["decoder"]
    gc.collect()
    assert sum(map(len, decoder._kept.values())) == 6


def test_where_recording_fails_captions_are_written_as_before(
    folder: Path | str, plain: Captioner, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(call: Any, inputs: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    captioner = holding(Captioner.load(folder, runtime="torch"), fail)
    expected = words(plain.caption(PHOTOS, max_length=16, num_beams=3))
    for _ in range(4):
        assert words(captioner.caption(PHOTOS, max_length=16, num_beams=3)) == expected
    (line,) = [each for each in caplog.messages if "graph" in each]
    assert "out of memory" in line
