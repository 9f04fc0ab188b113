"""What the stages of the default captioner share: captions as tensors, words drawn one by one."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

RECIPE = Path(__file__).parents[2] / "recipes" / "default_captioner"


@pytest.fixture
def captioning(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module("captioning")
    for name in set(sys.modules) - before:
        if str(RECIPE.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def model(captioning):
    config = tomllib.loads((RECIPE / "config.toml").read_text(encoding="utf-8"))
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config["encoder"] |= {**small, "image_size": 32, "stem_channels": [4, 4, 8, 16]}
    config["decoder"] |= {**small, "vocab_size": 12, "num_hidden_layers": 2}
    torch.manual_seed(0)
    made = captioning.new_model(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter)
    return made


def drawn_rows(captioning, count: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 4, (count, captioning.MAX_LENGTH), generator=chance)
    rows[-1] = rows[-1].clamp(min=1)  # one that does not end
    return rows.tolist()


def test_shifted_captions_are_those_of_a_loop(captioning):
    rows = drawn_rows(captioning, 40)
    inputs, targets = captioning.shifted(torch.tensor(rows))
    for row, read, wanted in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
        end = row.index(captioning.START) if captioning.START in row else None
        kept = row if end is None else row[: end + 1]
        padding = [captioning.IGNORED] * (captioning.MAX_LENGTH - len(kept))
        assert wanted == [*kept, *padding]
        assert read[: len(kept)] == [captioning.START, *kept[:-1]]
    assert captioning.told(torch.tensor(rows)) == [
        row[: row.index(captioning.START)] if captioning.START in row else row for row in rows
    ]


def test_trimmed_places_score_what_counts_and_no_more(captioning):
    inputs, targets = captioning.shifted(torch.tensor(drawn_rows(captioning, 6))[:5])
    shorter, wanted, places = captioning.trimmed(inputs, targets)
    assert wanted.shape == shorter.shape
    assert wanted.flatten()[places].tolist() == [
        token for token in targets.flatten().tolist() if token != captioning.IGNORED
    ]


@torch.no_grad()
def test_likeliest_words_are_those_of_whole_sequences(captioning, model):
    """Rows that leave the batch early and caches change nothing: compare with no cache at all."""
    pixels = torch.randn(7, 3, 32, 32)
    prefix = model.encode(pixels)
    rows = captioning.told(
        captioning.rollout(model, captioning.image_cache(model, prefix), 1, drawn=False)
    )
    assert len({len(row) for row in rows}) > 1, "all captions are of one length: a poor test"
    for picture, row in enumerate(rows):
        words = [captioning.START]
        while len(words) <= captioning.MAX_LENGTH:
            hidden = model.decoder(torch.tensor([words]), prefix_embeds=prefix[picture][None])[0]
            words.append(int(model.decoder.logits(hidden[:, -1]).argmax()))
            if words[-1] == captioning.START:
                break
        assert row == [word for word in words[1:] if word != captioning.START]


@torch.no_grad()
def test_drawn_words_are_as_frequent_as_they_are_likely(captioning, model):
    prefix = model.encode(torch.randn(1, 3, 32, 32))
    cache = captioning.image_cache(model, prefix)
    torch.manual_seed(5)
    first = captioning.rollout(model, cache, 4000, drawn=True)[:, 0]
    start = torch.tensor([[captioning.START]])
    hidden = model.decoder(start, prefix_embeds=prefix)[0]
    likely = model.decoder.logits(hidden[:, -1])[0].softmax(-1)
    found = torch.bincount(first, minlength=len(likely)) / len(first)
    # Four deviations of a share of 4,000 draws.
    assert ((found - likely).abs() <= 4 * (likely * (1 - likely) / 4000).sqrt() + 1e-3).all()
