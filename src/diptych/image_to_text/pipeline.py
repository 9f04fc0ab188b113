"""Stand in for the `image-to-text` pipeline that transformers 5 removed."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import GeneratorType
from typing import Any

from PIL import Image, UnidentifiedImageError

from diptych.errors import BadImage, BadInput
from diptych.image_to_text.caption import Caption
from diptych.image_to_text.captioner import Captioner
from diptych.images import ImageLimits

__all__ = ["ImageToTextPipeline", "UnreadableImage", "pipeline"]

Answer = list[dict[str, str]]

# On the model card of nlpconnect/vit-gpt2-image-captioning.
_MAX_LENGTH = 16


class UnreadableImage(BadImage, UnidentifiedImageError):
    """Report a picture that cannot be read, also to code that waits for Pillow's own error."""


def pipeline(
    task: str | None = None,
    model: str | Path | Captioner | None = None,
    *,
    device: Any = None,
    torch_dtype: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    runtime: str = "auto",
    batch_size: int = 1,
    allow_urls: bool = False,
    **ignored: Any,
) -> ImageToTextPipeline:
    """Build a pipeline as `transformers.pipeline("image-to-text", model=…)` did.

    `device` takes -1, an index, a name or a torch device. The tokenizer and image processor are
    the model's own. Raises KeyError for another task, as transformers does.
    """
    if task is None and model is None:
        raise RuntimeError("a pipeline needs a task or a model: give task='image-to-text'")
    if task not in (None, "image-to-text"):
        raise KeyError(f"Unknown task {task}, available tasks are ['image-to-text']")
    unknown = set(ignored) - _IGNORED
    if unknown:
        raise TypeError(f"pipeline() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    if not isinstance(model, Captioner):
        model = Captioner.load(
            "default" if model is None else model,
            runtime=runtime,
            device=_device(device),
            dtype=_dtype(dtype if dtype is not None else torch_dtype),
            revision=revision,
        )
    return ImageToTextPipeline(model, batch_size=batch_size, allow_urls=allow_urls)


# Accepted because old code passes them; the model's folder decides all of this.
_IGNORED = {
    "config",
    "feature_extractor",
    "framework",
    "image_processor",
    "model_kwargs",
    "processor",
    "token",
    "tokenizer",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
}


class ImageToTextPipeline:
    """Call with pictures, get `[{"generated_text": …}]` for one and a list of those for several."""

    task = "image-to-text"

    def __init__(self, model: Captioner, *, batch_size: int = 1, allow_urls: bool = False) -> None:
        self.model = model
        self.batch_size = batch_size
        self.allow_urls = allow_urls

    def __call__(
        self,
        inputs: Any = None,
        *,
        images: Any = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """Caption a path, URL, base64 string or PIL image, a list of them, or a generator.

        `max_length` is 16 where nothing else is said, as on the model card. `images` is another
        name for `inputs`. Raises ValueError for what is no picture or no option.
        """
        inputs = images if inputs is None else inputs
        if inputs is None:
            raise ValueError("Cannot call the image-to-text pipeline without an inputs argument!")
        options = _generate_options(max_new_tokens, generate_kwargs, prompt)
        limits = ImageLimits() if timeout is None else ImageLimits(timeout_s=timeout)
        inputs = _each_of(inputs)
        several = not _is_one(inputs)
        captions = self._captions(
            inputs if several else [inputs], options, limits, batch_size or self.batch_size
        )
        if isinstance(inputs, GeneratorType):
            return captions
        answers = list(captions)
        return answers if several else answers[0]

    def _captions(
        self, inputs: Any, options: dict[str, Any], limits: ImageLimits, batch_size: int
    ) -> Iterator[Answer]:
        try:
            for caption in self.model.captions(
                map(_source, inputs),
                batch_size=batch_size,
                on_error="raise",
                alpha="drop",  # as transformers does
                limits=limits,
                allow_urls=self.allow_urls,
                **options,
            ):
                yield _answer(caption)
        except UnreadableImage:
            raise
        except BadImage as error:
            raise UnreadableImage(error.name, error.reason) from error


def _generate_options(
    max_new_tokens: int | None, generate_kwargs: Mapping[str, Any] | None, prompt: str | None
) -> dict[str, Any]:
    options = dict(generate_kwargs or {})
    if max_new_tokens is not None:
        if "max_new_tokens" in options:
            raise ValueError(
                "`max_new_tokens` is defined both as an argument and inside `generate_kwargs` "
                "argument, please use only 1 version"
            )
        options["max_new_tokens"] = max_new_tokens
    if not options.keys() & {"max_new_tokens", "max_length"}:
        options["max_length"] = _MAX_LENGTH
    if prompt is not None:
        options["prompt"] = prompt
    options.setdefault("strip", False)  # the old pipeline kept the trailing space
    return options


def _answer(caption: Caption) -> Answer:
    return [{"generated_text": each.text} for each in (caption, *caption.alternatives)]


def _each_of(inputs: Any) -> Any:
    """Return the items of a dataset, which is asked by number; anything else as it is."""
    is_dataset = hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
    if not is_dataset or isinstance(inputs, Iterable):
        return inputs
    return [inputs[number] for number in range(len(inputs))]


def _is_one(inputs: object) -> bool:
    known = isinstance(inputs, str | os.PathLike | Image.Image | Mapping)
    return known or not isinstance(inputs, Iterable)


def _source(image: object) -> Any:
    """Accept what transformers' `load_image` accepted, in its order, or raise its ValueError."""
    if isinstance(image, Mapping) and "images" in image:
        image = image["images"]
    if isinstance(image, Image.Image | os.PathLike):
        return image
    if not isinstance(image, str):
        raise BadInput(
            "Incorrect format used for image. Should be an url linking to an image, a base64 "
            f"string, a local path, or a PIL image. Got {type(image).__name__}"
        )
    if image.startswith(("http://", "https://", "data:")):
        return image
    if os.path.isfile(image):  # noqa: PTH113 (Path.is_file raises for a long base64 string)
        return image
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(
            "Incorrect image source. Must be a valid URL starting with `http://` or `https://`, a "
            f"valid path to an image file, or a base64 encoded string. Got {image[:200]}"
        ) from error


def _device(device: Any) -> str:
    if device is None:
        return "auto"
    if isinstance(device, int):
        return "cpu" if device < 0 else f"cuda:{device}"
    return str(device)


def _dtype(dtype: Any) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")
