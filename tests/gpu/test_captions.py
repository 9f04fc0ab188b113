"""Captions of a GPU are those of the CPU: token for token in float32, nearly all in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych import Captioner
from diptych.errors import DiptychError
from diptych.image_to_text.caption import Caption

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4},
    "sampling": {"do_sample": True, "num_beams": 1, "seed": 3},
}
MODELS = ("small", "default")


def open_captioner(model: str, small: Path, device: str, dtype: str) -> Captioner:
    name = small if model == "small" else "default"
    try:
        return Captioner.load(name, runtime="torch", device=device, dtype=dtype)
    except DiptychError as error:
        if model == "small":
            raise
        pytest.skip(f"no default captioner here: {error}")


def captions(captioner: Captioner, photos: list[Path], search: str) -> list[Caption]:
    # On both sides, and in one batch: sampling draws a stream for each picture.
    made = captioner.caption(photos, max_new_tokens=16, **SEARCHES[search])
    assert isinstance(made, list)
    assert not any(each.error for each in made)
    return made


@pytest.mark.parametrize("model", MODELS)
def test_float32_is_token_for_token(
    model: str, small_captioner: Path, device: str, photos: list[Path], note: Any
) -> None:
    here = open_captioner(model, small_captioner, "cpu", "float32")
    there = open_captioner(model, small_captioner, device, "float32")
    assert there.networks.device == device
    wrong = []
    for search in SEARCHES:
        wanted, found = (captions(each, photos, search) for each in (here, there))
        same = sum(a.token_ids == b.token_ids for a, b in zip(wanted, found, strict=True))
        apart = max(
            abs(a.score - b.score)
            for a, b in zip(wanted, found, strict=True)
            if a.score is not None
        )
        note(model=model, search=search, same=same, of=len(photos), score_apart=apart)
        if same < len(photos):
            wrong.append(search)
    assert not wrong


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_half_precision_says_nearly_the_same(
    model: str, dtype: str, small_captioner: Path, device: str, photos: list[Path], note: Any
) -> None:
    here = open_captioner(model, small_captioner, "cpu", "float32")
    there = open_captioner(model, small_captioner, device, dtype)
    assert there.networks.dtype == dtype
    for search in ("greedy", "beams"):
        pairs = [
            (a.token_ids, b.token_ids)
            for a, b in zip(*(captions(c, photos, search) for c in (here, there)), strict=True)
        ]
        share = float(np.mean([_agreeing(*pair) for pair in pairs]))
        same = sum(a == b for a, b in pairs)
        note(model=model, dtype=dtype, search=search, same=same, words_agreeing=share)
        # Random weights have words of nearly equal scores, and one that differs changes all after.
        assert share >= (0.7 if (model, dtype) == ("default", "float16") else 0.3)


@pytest.mark.parametrize("model", MODELS)
def test_later_captions_are_those_of_the_first(
    model: str,
    small_captioner: Path,
    device: str,
    photos: list[Path],
    note: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the second search of a kind on the cache is held and words are recorded."""
    captioner = open_captioner(model, small_captioner, device, "float32")
    for search in SEARCHES:
        made = [captions(captioner, photos, search) for _ in range(3)]
        ids = [[each.token_ids for each in one] for one in made]
        same = sum(a == b == c for a, b, c in zip(*ids, strict=True))
        note(model=model, search=search, same=same, of=len(photos))
        assert same == len(photos)
    assert not [each for each in caplog.messages if "graph" in each]


def test_words_come_one_by_one_and_show_where_they_look(
    small_captioner: Path, device: str, photos: list[Path], note: Any
) -> None:
    here = open_captioner("small", small_captioner, "cpu", "float32")
    there = open_captioner("small", small_captioner, device, "float32")
    said = ["".join(each.stream(photos[0], num_beams=4)) for each in (here, there)]
    maps = [each.caption(photos[1], num_beams=1).heatmap() for each in (here, there)]
    apart = float(np.abs(np.subtract(*maps)).max())
    note(same_stream=said[0] == said[1], heatmap_apart=apart)
    assert said[0] == said[1]
    assert apart < 1e-2 * float(np.abs(maps[0]).max())


def _agreeing(wanted: tuple[int, ...], found: tuple[int, ...]) -> float:
    """Return the share of words before the first that differs."""
    longest = max(len(wanted), len(found), 1)
    pairs = zip(wanted, found, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))
    return 1.0 if wanted == found else same / longest
