"""Judge a smaller captioner by what people wrote about the pictures, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diptych.errors import QualityLoss
from diptych.evaluation.caption_metrics import score_captions
from diptych.evaluation.captions import Described
from diptych.image_to_text.captioner import Captioner
from diptych.weights.files import ModelFolder

__all__ = ["caption_judge"]

# The share of CIDEr-D that a precision may cost.
_MOST_LOST = {"fp16": 0.005, "int8": 0.01, "int4": 0.05}


def caption_judge(
    described: Sequence[Described], *, force: bool = False
) -> Callable[[ModelFolder, ModelFolder], dict[str, Any]]:
    """Return a judge for `diptych.export`: it captions `described` before and after.

    The judge returns the CIDEr-D of both, the relative loss and the share of identical captions,
    as each model captions by itself. It raises `QualityLoss` where more is lost than 1 % by int8,
    5 % by int4 and 0.5 % by fp16, unless `force`.
    """

    def judge(before: ModelFolder, after: ModelFolder) -> dict[str, Any]:
        texts = [_caption_all(model, described) for model in (before, after)]
        references = [each.captions for each in described]
        old, new = (score_captions(each, references).cider_d for each in texts)
        lost = (old - new) / old if old > 0 else 0.0
        bound = _MOST_LOST.get(after.precision or "")
        if bound is not None and lost > bound and not force:
            raise QualityLoss(
                f"{after.precision} costs {lost:.1%} of CIDEr-D ({old:.3f} to {new:.3f}) on "
                f"{len(described)} pictures, the bound is {bound:.1%}: choose a wider precision, "
                "or force it"
            )
        same = sum(one == other for one, other in zip(*texts, strict=True))
        return {
            "pictures": len(described),
            "cider_d_before": old,
            "cider_d": new,
            "relative_loss": lost,
            "identical": same,
        }

    return judge


def _caption_all(model: ModelFolder, described: Sequence[Described]) -> list[str]:
    captioner = Captioner.from_model(model, runtime="onnxruntime")
    paths = [each.path for each in described]
    return [caption.text for caption in captioner.captions(paths, on_error="raise")]
