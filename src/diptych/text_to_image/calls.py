"""Decide what a call asks for before any work is done: options, sizes, seeds, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput, UnsupportedModel
from diptych.images import ImageInput
from diptych.runtimes.network import Array
from diptych.text_to_image.autoencoder import Autoencoder
from diptych.text_to_image.editing import (
    Native,
    image_subjects,
    inpaint_subjects,
    is_one_picture,
    spread,
    style_subjects,
)
from diptych.text_to_image.options import (
    GenerateOptions,
    ImageToImageOptions,
    InpaintOptions,
    size_notes,
)
from diptych.text_to_image.orders import (
    Subject,
    as_noise,
    check_numbers,
    is_single,
    take_orders,
)
from diptych.text_to_image.painter import Call, OnError, Painter
from diptych.text_to_image.schedules import NoiseSchedule
from diptych.text_to_image.style import normalised, style_layers
from diptych.text_to_image.style_options import StyleOptions
from diptych.weights.diffusion import GeneratorFolder

__all__ = ["Calls", "Images"]

Options = TypeVar("Options", bound=GenerateOptions)
Images = ImageInput | Sequence[ImageInput] | Iterator[ImageInput]

# It guides three rows of its own, each step as the one before.
_NOT_OF_STYLE: Mapping[str, tuple[object, ...]] = {
    "guidance_interval": (None,),
    "reuse_interval": (1,),
    "token_merging_ratio": (0.0,),
    "strength": (None, 1.0),
    "num_images_per_prompt": (None, 1),
    "seed": (None, 0),
    "sampler": (None, "ddim"),
}


class Calls:
    """Turn the arguments of `ImageGenerator` into calls that a painter carries out."""

    def __init__(
        self,
        model: GeneratorFolder,
        schedule: NoiseSchedule,
        autoencoder: Autoencoder,
        painter: Painter,
    ) -> None:
        self._model, self._schedule = model, schedule
        self._autoencoder, self._painter = autoencoder, painter

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the options that the model prefers."""
        side = int(self._model.configs["unet"]["sample_size"]) * self._autoencoder.downsampling
        schedule = self._schedule.config
        known = {"sampler": schedule.sampler, "schedule": schedule.schedule}
        return {"width": side, "height": side, **known, **self._model.defaults}

    def of_either(self, prompts: str | Iterable[str], *args: Any, **words: Any) -> Call:
        """Decide from the arguments what is asked for: words alone, a picture, or a part of one."""
        if words.get("image") is None:
            for word in ("image", "mask_image"):
                if words.pop(word, None) is not None:
                    raise BadInput(f"{word} is given without an image: give image= as well")
            prompts = [cast("str", prompts)] if is_single(prompts) else prompts
            return self.of_words(prompts, *args, **words)
        image, mask_image = words.pop("image"), words.pop("mask_image", None)
        options = args[0] if args else words.get("options")
        is_inpainting = mask_image is not None or isinstance(options, InpaintOptions)
        is_inpainting = is_inpainting or words.get("extend") is not None
        return self.of_pictures(
            *(image, cast("Any", prompts), *args),
            mask_image=mask_image,
            is_inpainting=is_inpainting,
            **words,
        )

    def of_words(
        self,
        prompts: Iterable[str],
        options: GenerateOptions | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Array | None = None,
        batch_size: int | None = None,
        on_error: OnError = "keep",
        **overrides: Any,
    ) -> Call:
        """Decide everything before any work is done."""
        asked = self._asked(GenerateOptions, options, overrides)
        noise = None if latents is None else as_noise(latents, self._autoencoder.latent_channels)
        resolved = self._resolve(asked, noise)
        self._check(resolved, batch_size, on_error)
        notes = size_notes(asked, resolved)
        if (negative_prompt or resolved.negative_prompt) and resolved.guidance_scale == 1:
            notes += ("the negative prompt has no effect, for guidance_scale is 1",)
        # A strength is for what is made out of another picture.
        resolved = resolved.replace(strength=None)
        if isinstance(prompts, Sized):
            pictures = len(prompts) * resolved.num_images_per_prompt
            check_numbers(len(prompts), pictures, negative_prompt, noise)
        subjects = (Subject(prompt, resolved, notes) for prompt in prompts)
        return Call(take_orders(subjects, negative_prompt, noise), batch_size, on_error)

    def of_pictures(
        self,
        image: Images,
        prompt: str | Iterable[str] = "",
        options: GenerateOptions | None = None,
        *,
        mask_image: Images | None = None,
        is_inpainting: bool = False,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Array | None = None,
        batch_size: int | None = None,
        on_error: OnError = "keep",
        **overrides: Any,
    ) -> Call:
        """Decide what is made out of pictures; each is opened when its turn comes."""
        one_image, one_prompt = is_one_picture(image), is_single(prompt)
        one_mask = mask_image is None or is_one_picture(mask_image)
        prompt = prompt if one_prompt else list(prompt)
        mask_image = mask_image if one_mask else list(cast("Iterable[ImageInput]", mask_image))
        count = None if one_image or isinstance(image, Iterator) else len(cast("list[Any]", image))
        if one_image:
            # One picture with several prompts, or masks, is that many pictures.
            several = mask_image if not one_mask else prompt
            count = 1 if one_prompt and one_mask else len(cast("list[Any]", several))
            image = [cast("ImageInput", image)] * count
        images = cast("Iterable[ImageInput]", image)
        prompts = spread(cast("Any", prompt), one_prompt, count, "prompts")
        noise = None if latents is None else as_noise(latents, self._autoencoder.latent_channels)
        kind = InpaintOptions if is_inpainting else ImageToImageOptions
        asked = self._asked(kind, options, overrides)
        native = Native(self.defaults, self._autoencoder.downsampling)
        resolved = native.resolve_all_but_size(asked)
        self._check(resolved, batch_size, on_error)
        if count is not None:
            check_numbers(count, count * resolved.num_images_per_prompt, negative_prompt, noise)
        # Drawn once for the call: its pictures count on from there.
        asked = asked.replace(seed=resolved.seed)
        if isinstance(asked, InpaintOptions):
            masks = spread(cast("Any", mask_image), one_mask, count, "masks")
            subjects = inpaint_subjects(images, masks, prompts, asked, native)
        else:
            subjects = image_subjects(images, prompts, asked, native)
        return Call(take_orders(subjects, negative_prompt, noise), batch_size, on_error)

    def of_styles(
        self,
        content: Images,
        style: ImageInput | Sequence[ImageInput],
        options: GenerateOptions | None = None,
        *,
        prompt: str = "",
        style_weights: Sequence[float] | None = None,
        mask_image: ImageInput | None = None,
        on_error: OnError = "keep",
        **overrides: Any,
    ) -> tuple[Call, tuple[float, ...]]:
        """Decide what takes on which styles, and how much each of them counts."""
        if isinstance(overrides.get("adain"), bool):
            overrides["adain"] = float(overrides["adain"])
        if isinstance(overrides.get("layers"), list | tuple):
            overrides["layers"] = ",".join(map(str, overrides["layers"]))
        asked = self._asked(StyleOptions, options, overrides)
        for word, without in _NOT_OF_STYLE.items():
            if getattr(asked, word) not in without:
                raise BadInput(f"{word} is not for style_transfer: leave it out")
        if asked.num_inference_steps not in (None, asked.num_inversion_steps):
            raise BadInput(
                "style_transfer takes as many steps as num_inversion_steps says: give it"
            )
        if not isinstance(prompt, str):
            raise BadInput(f"prompt is {prompt!r}: style_transfer takes one, a string")
        chosen = {"sampler": "ddim", "num_inference_steps": asked.num_inversion_steps}
        asked = asked.replace(**chosen, seed=0, num_images_per_prompt=1, strength=1.0)
        asked.chosen_layers(*style_layers(self._model.configs["unet"]))
        if self._painter.takes_mask():
            raise UnsupportedModel(
                f"{self._model.name} is made for inpainting: take an ordinary model for style"
            )
        styles = cast("list[ImageInput]", [style] if is_one_picture(style) else list(style))  # type: ignore[arg-type]
        if not styles:
            raise BadInput("no style is given: give at least one picture")
        weights = normalised(style_weights, len(styles))
        contents = [content] if is_one_picture(content) else content
        # The model's guidance is for drawing from words alone.
        defaults = {**self.defaults, "guidance_scale": None}
        native = Native(defaults, self._autoencoder.downsampling)
        self._check(native.resolve_all_but_size(asked), None, on_error)
        subjects = style_subjects(
            cast("Iterable[ImageInput]", contents), styles, mask_image, prompt, asked, native
        )
        call = Call(take_orders(subjects), None, on_error)
        return call, weights

    def _asked(self, kind: type[Options], options: object, overrides: Mapping[str, Any]) -> Options:
        if not isinstance(options, GenerateOptions | None):
            raise BadInput(
                f"options is {options!r}: give {kind.__name__}(…), or its words by keyword"
            )
        if isinstance(overrides.get("guidance_interval"), tuple | list):
            interval = ",".join(map(str, overrides["guidance_interval"]))
            overrides = {**overrides, "guidance_interval": interval}
        return kind.of(options).replace(**overrides)

    def _check(self, resolved: GenerateOptions, batch_size: int | None, on_error: str) -> None:
        """Tell a combination that cannot be before any prompt is read."""
        if on_error not in ("keep", "raise"):
            raise BadInput(f"on_error is {on_error!r}: give 'keep' or 'raise'")
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise BadInput(f"batch_size is {batch_size!r}: give a whole number of 1 or more")
        self._painter.check(resolved)
        for name, config in self._model.configs.items():
            if not name.startswith("text_encoder") or not resolved.clip_skip:
                continue
            most = int(config["num_hidden_layers"]) + 1 + int(config.get("output_layer", -1))
            if resolved.clip_skip > most:
                raise BadInput(
                    f"clip_skip is {resolved.clip_skip}: give 0 to {most}, for the {name} has no "
                    "more layers"
                )

    def _resolve(
        self, asked: GenerateOptions, noise: NDArray[np.float32] | None
    ) -> GenerateOptions:
        if noise is not None:
            height, width = (side * self._autoencoder.downsampling for side in noise.shape[2:])
            wanted = (asked.width or width, asked.height or height)
            if wanted != (width, height):
                raise BadInput(
                    f"latents are the noise of a picture of {width}x{height}, but "
                    f"{wanted[0]}x{wanted[1]} is asked for: leave width and height out"
                )
            asked = asked.replace(width=width, height=height)
        return asked.resolve(self.defaults, multiple_of=self._autoencoder.downsampling)
