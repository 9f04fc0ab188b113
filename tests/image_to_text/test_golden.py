"""Files and captions of transformers 4.57.6, which the other tests do not have at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych import Captioner
from tiny_models import make_photo

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers-4.57.6"


@pytest.mark.parametrize("model", ["0", "1", "2"])
def test_captions_of_transformers_4(model: str) -> None:
    captioner = Captioner.load(GOLDEN / model, runtime="torch")
    rows = [json.loads(line) for line in (GOLDEN / "expected.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["model"] == model]
    assert len(rows) == 18
    for row in rows:
        caption = captioner.caption(make_photo(row["photo"]), **row["options"])
        ours = [caption, *caption.alternatives]
        assert [list(each.token_ids) for each in ours] == row["token_ids"], row["options"]
        if row["scores"] is not None:
            assert [each.score for each in ours] == pytest.approx(row["scores"], abs=1e-4)
