"""Judge a smaller model by what it is for, before it gets its name: captions, drawn scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diptych.errors import QualityLoss
from diptych.evaluation.adherence import report
from diptych.evaluation.caption_metrics import score_captions
from diptych.evaluation.captions import Described
from diptych.evaluation.image_metrics import psnr, ssim
from diptych.evaluation.scenes import evaluation_prompts
from diptych.image_to_text.captioner import Captioner
from diptych.text_to_image.generator import ImageGenerator
from diptych.text_to_image.options import GenerateOptions
from diptych.weights.diffusion import GeneratorFolder
from diptych.weights.files import ModelFolder

__all__ = ["caption_judge", "picture_judge"]

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


_SCENES = 20  # that a model of our own draws where nobody says how many
_SEED = 1  # of prompts that are neither the held-out ones nor those that choose


def picture_judge(
    scenes: int | None = None,
) -> Callable[[GeneratorFolder, GeneratorFolder], dict[str, Any]]:
    """Return a judge for `diptych.export`: it draws `scenes` prompts of `evaluate images` twice.

    The judge returns PSNR and SSIM of the pictures after against those before, by the same seeds,
    and the share of prompts that each followed, by task. None draws 20 with a model that was
    trained on such scenes, and nothing with others, for which it would say little and take long.
    """

    def judge(before: GeneratorFolder, after: GeneratorFolder) -> dict[str, Any]:
        count = scenes if scenes is not None else _SCENES * (before.family == "diptych")
        if not count:
            return {}
        prompts = evaluation_prompts(count, _SEED)
        texts, options = [each.prompt for each in prompts], GenerateOptions(seed=0)
        old, new = (
            [each.image for each in ImageGenerator.from_model(model).images(texts, options)]
            for model in (before, after)
        )
        pairs = list(zip(new, old, strict=True))
        signal = [min(psnr(*pair), 200.0) for pair in pairs]  # equal pictures are infinitely near
        return {
            "pictures": count,
            "psnr_db": round(sum(signal) / count, 2),
            "worst_psnr_db": round(min(signal), 2),
            "ssim": round(sum(ssim(*pair) for pair in pairs) / count, 4),
            "adherence_before": _shares(report(prompts, old).as_dict()),
            "adherence": _shares(report(prompts, new).as_dict()),
        }

    return judge


def _shares(found: dict[str, Any]) -> dict[str, float]:
    scores = {name: each for part in found.values() for name, each in part.items()}
    return {name: round(score["share"], 4) for name, score in scores.items()}
