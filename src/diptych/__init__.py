"""Turn pictures into words and words into pictures, on one's own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diptych.errors import DiptychError as DiptychError
    from diptych.image_to_text.caption import Caption as Caption
    from diptych.image_to_text.captioner import Captioner as Captioner
    from diptych.image_to_text.captioner import caption as caption
    from diptych.image_to_text.options import CaptionOptions as CaptionOptions
    from diptych.image_to_text.pipeline import pipeline as pipeline
    from diptych.runtimes.conversion import export as export
    from diptych.text_to_image.generated_image import GeneratedImage as GeneratedImage
    from diptych.text_to_image.generator import ImageGenerator as ImageGenerator
    from diptych.text_to_image.generator import generate as generate
    from diptych.text_to_image.infotext import read_settings as read_settings
    from diptych.text_to_image.options import GenerateOptions as GenerateOptions
    from diptych.text_to_image.options import ImageToImageOptions as ImageToImageOptions
    from diptych.text_to_image.options import InpaintOptions as InpaintOptions
    from diptych.text_to_image.style_options import StyleOptions as StyleOptions
    from diptych.training.finetune import finetune_captioner as finetune_captioner
    from diptych.training.finetune import finetune_generator as finetune_generator
    from diptych.training.options import CaptionerTrainOptions as CaptionerTrainOptions
    from diptych.training.options import GeneratorTrainOptions as GeneratorTrainOptions
    from diptych.weights.catalog import available_models as available_models

# Public name → the module that defines it; imported when first used, so that `import diptych`
# costs next to nothing.
_HOMES = {
    "Caption": "diptych.image_to_text.caption",
    "CaptionOptions": "diptych.image_to_text.options",
    "CaptionerTrainOptions": "diptych.training.options",
    "Captioner": "diptych.image_to_text.captioner",
    "DiptychError": "diptych.errors",
    "GenerateOptions": "diptych.text_to_image.options",
    "GeneratorTrainOptions": "diptych.training.options",
    "GeneratedImage": "diptych.text_to_image.generated_image",
    "ImageGenerator": "diptych.text_to_image.generator",
    "ImageToImageOptions": "diptych.text_to_image.options",
    "InpaintOptions": "diptych.text_to_image.options",
    "StyleOptions": "diptych.text_to_image.style_options",
    "available_models": "diptych.weights.catalog",
    "caption": "diptych.image_to_text.captioner",
    "export": "diptych.runtimes.conversion",
    "finetune_captioner": "diptych.training.finetune",
    "finetune_generator": "diptych.training.finetune",
    "generate": "diptych.text_to_image.generator",
    "pipeline": "diptych.image_to_text.pipeline",
    "read_settings": "diptych.text_to_image.infotext",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diptych' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
