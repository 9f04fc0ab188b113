"""Generate pictures from words: the object users hold."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput, DiptychError, UnsupportedModel
from diptych.runtimes.network import Array, OpenNetworks, open_generator_networks, require_torch
from diptych.text import ClipTokenizer
from diptych.text_to_image.batch import Batch, Conditioning, Row, alike, stacked
from diptych.text_to_image.denoiser import build_denoiser, guidance_embedding
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.options import GenerateOptions, size_notes
from diptych.text_to_image.orders import Order, as_noise, is_single, take_orders
from diptych.text_to_image.previews import DenoisingStep, fit_latent_rgb, latent_to_rgb
from diptych.text_to_image.prompts import PromptPair, encode_prompts
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig, Steps
from diptych.weights.diffusion import GeneratorFolder, resolve_generator

if TYPE_CHECKING:
    from torch import nn

    from diptych.weights.adapters import EmbeddingHandle, LoraHandle

__all__ = ["GeneratedImage", "ImageGenerator", "OnError", "generate"]

logger = logging.getLogger("diptych")

OnError = Literal["keep", "raise"]

# Latent pixels that are worked on at once where the caller does not say how many pictures.
_LATENT_PIXELS = {"cpu": 64 * 64, "gpu": 4 * 64 * 64}
_MOST_AT_ONCE = 8
_TAKE_ETA = ("ddim", "dpmpp_2m", "dpmpp_2m_sde")


class ImageGenerator:
    """Make pictures from words with a latent diffusion model (Rombach et al. 2022)."""

    def __init__(
        self,
        networks: OpenNetworks,
        tokenizers: Mapping[str, ClipTokenizer],
        model: GeneratorFolder,
    ) -> None:
        self.networks = networks
        self.tokenizers = dict(tokenizers)
        self.model = model
        self.schedule = NoiseSchedule(ScheduleConfig(**model.schedule))
        vae = model.configs["vae"]
        self.downsampling = vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)
        self.latent_channels = int(vae.get("latent_channels", 4))
        self._scaling_factor = float(vae.get("scaling_factor", 0.18215))
        self._shift_factor = float(vae.get("shift_factor", 0.0))
        self._latent_rgb: NDArray[np.floating] | None = None
        self._plain_tokenizers = dict(tokenizers)
        self._loras: list[LoraHandle] = []
        self._learned: dict[str, EmbeddingHandle] = {}
        self._last_words: tuple[tuple[object, ...], PromptPair] | None = None

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "default",
        *,
        runtime: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        prediction_type: str | None = None,
        offload: bool | None = None,
    ) -> Self:
        """Load a generator by name: "default", a folder, a single file, or a hub id.

        `runtime` is auto, onnxruntime or torch; `device` auto, cpu, cuda, …; `dtype` auto, float32,
        bfloat16 or float16. `prediction_type` (epsilon, v_prediction, sample) overrules what the
        checkpoint says, which single files often leave open. With `offload` each network is on the
        GPU for its turn only; None does so where there is too little memory. Raises `UnknownModel`,
        `UnsupportedModel`, `WeightsMismatch`, `MissingExtra`, or `BadInput` for a combination that
        cannot be.
        """
        if not isinstance(name_or_path, str | Path):
            raise BadInput(f"a model is given by name or folder, not as {name_or_path!r}")
        seen = sys.stderr is not None and sys.stderr.isatty()
        model = resolve_generator(
            name_or_path, revision=revision, progress=seen, prediction_type=prediction_type
        )
        return cls.from_model(model, runtime=runtime, device=device, dtype=dtype, offload=offload)

    @classmethod
    def from_model(
        cls,
        model: GeneratorFolder,
        *,
        runtime: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        offload: bool | None = None,
    ) -> Self:
        """Load a generator from a folder or file that was already looked into."""
        networks = open_generator_networks(
            model, runtime=runtime, device=device, dtype=dtype, offload=offload
        )
        tokenizers = {name: files.open() for name, files in model.tokenizers.items()}
        return cls(networks, tokenizers, model)

    @property
    def options(self) -> GenerateOptions:
        """Return the options that hold where the caller sets none: the model's own."""
        return GenerateOptions().resolve(self._defaults)

    @overload
    def generate(
        self,
        prompt: str,
        options: GenerateOptions | None = ...,
        *,
        negative_prompt: str | None = ...,
        latents: Array | None = ...,
        batch_size: int | None = ...,
        on_error: OnError = ...,
        num_images_per_prompt: None = ...,
        **overrides: Any,
    ) -> GeneratedImage: ...

    @overload
    def generate(
        self,
        prompt: str | Iterable[str],
        options: GenerateOptions | None = ...,
        *,
        negative_prompt: str | Sequence[str] | None = ...,
        latents: Array | None = ...,
        batch_size: int | None = ...,
        on_error: OnError = ...,
        num_images_per_prompt: int | None = ...,
        **overrides: Any,
    ) -> list[GeneratedImage]: ...

    def generate(
        self,
        prompt: str | Iterable[str],
        options: GenerateOptions | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Array | None = None,
        batch_size: int | None = None,
        on_error: OnError = "keep",
        num_images_per_prompt: int | None = None,
        **overrides: Any,
    ) -> GeneratedImage | list[GeneratedImage]:
        """Make the picture of one prompt, or those of a list.

        `overrides` are words of `GenerateOptions` and win over `options`. Picture i of the call has
        seed + i, whatever `batch_size` is made at once. `latents` [pictures, C, h, w] are standard
        normal noise to start from instead. One prompt gives one picture, or a list where
        `num_images_per_prompt` is more than 1. In a list, a picture that fails holds its `error`
        and the others go on, unless `on_error="raise"`; a single prompt raises.
        """
        single = is_single(prompt)
        if on_error not in ("keep", "raise"):
            raise BadInput(f"on_error is {on_error!r}: give 'keep' or 'raise'")
        if num_images_per_prompt is not None:
            overrides["num_images_per_prompt"] = num_images_per_prompt
        made = list(
            self.images(
                [cast("str", prompt)] if single else prompt,
                options,
                negative_prompt=negative_prompt,
                latents=latents,
                batch_size=batch_size,
                on_error="raise" if single else on_error,
                **overrides,
            )
        )
        if not made:
            raise BadInput("the list of prompts is empty: give at least one")
        return made[0] if single and len(made) == 1 else made

    def images(self, prompts: Iterable[str], *args: Any, **words: Any) -> Iterator[GeneratedImage]:
        """Yield the pictures of a list of prompts, each as soon as it is finished.

        Arguments are those of `generate`; prompts are read as they are needed.
        """
        events = self.follow(prompts, *args, **words)
        return (event for event in events if isinstance(event, GeneratedImage))

    def denoising_steps(
        self, prompt: str | Iterable[str], *args: Any, **words: Any
    ) -> Iterator[DenoisingStep]:
        """Yield every denoising step, to show progress and previews; stop reading to cancel.

        Arguments are those of `generate`. `step.preview()` is a cheap picture of what is to come,
        `step.result()` the picture as it is now, which at the last step is the finished one.
        """
        prompts = [cast("str", prompt)] if is_single(prompt) else prompt
        events = self._follow(self._call(prompts, *args, **words), finish=False)
        return (event for event in events if isinstance(event, DenoisingStep))

    def follow(
        self, prompts: Iterable[str], *args: Any, **words: Any
    ) -> Iterator[DenoisingStep | GeneratedImage]:
        """Yield every denoising step and, between them, every finished picture, as they come.

        Arguments are those of `generate`.
        """
        return self._follow(self._call(prompts, *args, **words))

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the pictures of latents [B, C, h, w], those of a step or of another program.

        Raises `DiptychError` where a picture would hold numbers that are not finite.
        """
        if len(latents.shape) != 4 or latents.shape[1] != self.latent_channels:
            raise BadInput(
                f"latents have the shape {list(latents.shape)}: give "
                f"[pictures, {self.latent_channels}, height, width]"
            )
        unscaled = self.networks.array(latents) if isinstance(latents, np.ndarray) else latents
        unscaled = unscaled / self._scaling_factor + self._shift_factor
        (decoded,) = self.networks["vae_decoder"](latents=unscaled)
        pixels = self.networks.numpy(decoded)
        if not np.isfinite(pixels).all():
            raise DiptychError(
                f"{self.model.name}: the decoded picture holds numbers that are not finite: the "
                "latents or the weights of the autoencoder are damaged"
            )
        levels = (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(picture) for picture in levels.transpose(0, 2, 3, 1)]

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scaled latents [B, C, h, w] of pixels [B, 3, H, W] in -1..1."""
        mean, _ = self.networks["vae_encoder"](pixel_values=self.networks.array(pixel_values))
        return (self.networks.numpy(mean) - self._shift_factor) * self._scaling_factor

    def load_lora(self, path: str | Path, scale: float = 1.0, *, fused: bool = False) -> LoraHandle:
        """Put a LoRA file into the networks; several add up.

        `scale` 1 is what it was trained for. `fused` adds it to the weights: no slower, but
        the weights as they were are kept besides. Returns a handle with `set_scale`. Raises
        `WeightsMismatch` for a file of another family, `UnsupportedModel` outside of torch.
        """
        from diptych.weights.adapters import apply_lora

        handle = apply_lora(self._modules("a LoRA"), path, scale, fused)
        self._loras.append(handle)
        self._last_words = None
        return handle

    def unload_lora(self, handle: LoraHandle | None = None) -> None:
        """Take one LoRA out, or all: the weights are again what they were, to the bit."""
        for each in list(reversed(self._loras)):
            if handle is None or each is handle:
                each.remove()
                self._loras.remove(each)
        self._last_words = None

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Teach the text encoders a learned word, and return it: `token`, or the file's own.

        Raises `WeightsMismatch` for a file of another family, `BadInput` for a word that is known
        already, `UnsupportedModel` outside of torch.
        """
        from diptych.weights.adapters import add_embedding

        handle = add_embedding(self._modules("a learned word"), path, token)
        try:
            if handle.token in self._learned:
                raise BadInput(f"{handle.token!r} is loaded already: give token= another name")
            self._set_learned({**self._learned, handle.token: handle})
        except DiptychError:
            handle.remove()
            raise
        return handle.token

    def unload_textual_inversion(self, token: str | None = None) -> None:
        """Forget one learned word, or all."""
        if token is not None and token not in self._learned:
            known = ", ".join(self._learned) or "none"
            raise BadInput(f"{token!r} is no learned word that is loaded; there are: {known}")
        forgotten = list(self._learned) if token is None else [token]
        for each in reversed(forgotten):
            self._learned[each].remove()
        self._set_learned({t: h for t, h in self._learned.items() if t not in forgotten})

    def _set_learned(self, learned: dict[str, EmbeddingHandle]) -> None:
        tokenizers = dict(self._plain_tokenizers)
        for name, tokenizer in self._plain_tokenizers.items():
            encoder = name.replace("tokenizer", "text_encoder")
            words = {token: handle.ids[encoder] for token, handle in learned.items()}
            tokenizers[name] = tokenizer.with_placeholders(words)
        self.tokenizers, self._learned, self._last_words = tokenizers, learned, None

    def _modules(self, what: str) -> Mapping[str, nn.Module]:
        if self.networks.modules is None:
            raise UnsupportedModel(
                f"{self.model.name} runs in {self.networks.runtime}, where {what} cannot be "
                "loaded: load the generator with runtime='torch'"
            )
        return self.networks.modules

    def save(self, path: str | Path, *, layout: str = "diffusers") -> None:
        """Write the model so that others load it: a folder of diffusers, or with "ldm" one file.

        LoRAs and learned words that are loaded are left out. Needs the torch extra.
        """
        require_torch("saving a checkpoint")
        from diptych.weights.load_generator import load_generator
        from diptych.weights.save_generator import save_generator

        save_generator(load_generator(self.model), self.model, Path(path), layout=layout)

    def export(self, folder: str | Path, *, quantize: str | None = None) -> dict[str, Any]:
        """Write the model as ONNX graphs that run without torch, and compare pictures of both.

        `quantize` stores the weights smaller: "fp16" or "int8". Returns the content of
        `export.json`. Needs the export extra.
        """
        from diptych.runtimes.conversion import export_model

        return export_model(self.model, folder, quantize=quantize)

    # Hops of a picture ------------------------------------------------------------------------

    @property
    def _defaults(self) -> dict[str, Any]:
        """Return the options that the model prefers."""
        side = int(self.model.configs["unet"]["sample_size"]) * self.downsampling
        schedule = self.schedule.config
        known = {"sampler": schedule.sampler, "schedule": schedule.schedule}
        return {"width": side, "height": side, **known, **self.model.defaults}

    def _call(
        self,
        prompts: Iterable[str],
        options: GenerateOptions | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Array | None = None,
        batch_size: int | None = None,
        on_error: OnError = "keep",
        **overrides: Any,
    ) -> _Call:
        """Decide everything before any work is done."""
        if on_error not in ("keep", "raise"):
            raise BadInput(f"on_error is {on_error!r}: give 'keep' or 'raise'")
        if not isinstance(options, GenerateOptions | None):
            raise BadInput(
                f"options is {options!r}: give GenerateOptions(…), or its words by keyword"
            )
        asked = (options or GenerateOptions()).replace(**overrides)
        noise = None if latents is None else as_noise(latents, self.latent_channels)
        resolved = self._resolve(asked, noise)
        at_once = self._at_once(resolved) if batch_size is None else batch_size
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise BadInput(f"batch_size is {batch_size!r}: give a whole number of 1 or more")
        self._steps(resolved)  # a combination that cannot be is told before any prompt is read
        notes = size_notes(asked, resolved)
        orders = take_orders(prompts, resolved, negative_prompt, noise, notes)
        return _Call(orders, at_once, on_error)

    def _resolve(
        self, asked: GenerateOptions, noise: NDArray[np.float32] | None
    ) -> GenerateOptions:
        if noise is not None:
            height, width = (side * self.downsampling for side in noise.shape[2:])
            wanted = (asked.width or width, asked.height or height)
            if wanted != (width, height):
                raise BadInput(
                    f"latents are the noise of a picture of {width}x{height}, but "
                    f"{wanted[0]}x{wanted[1]} is asked for: leave width and height out"
                )
            asked = asked.replace(width=width, height=height)
        return asked.resolve(self._defaults, multiple_of=self.downsampling)

    def _at_once(self, options: GenerateOptions) -> int:
        _, height, width = self._latent_shape(options)
        room = _LATENT_PIXELS["cpu" if self.networks.device == "cpu" else "gpu"]
        return max(1, min(_MOST_AT_ONCE, room // (height * width)))

    def _latent_shape(self, options: GenerateOptions) -> tuple[int, int, int]:
        assert options.width is not None and options.height is not None
        down = self.downsampling
        return self.latent_channels, options.height // down, options.width // down

    def _steps(self, options: GenerateOptions) -> Steps:
        assert options.sampler is not None and options.num_inference_steps is not None
        steps = self.schedule.steps(
            options.sampler,
            options.num_inference_steps,
            schedule=options.schedule,
            spacing=options.timestep_spacing,
        )
        if options.eta is None:
            return steps
        if options.sampler not in _TAKE_ETA:
            raise BadInput(
                f"eta is for the samplers {', '.join(_TAKE_ETA)}, not for {options.sampler}: leave "
                "it out, or take one of these"
            )
        return replace(steps, settings={**steps.settings, "eta": options.eta})

    def _follow(
        self, call: _Call, *, finish: bool = True
    ) -> Iterator[DenoisingStep | GeneratedImage]:
        while orders := list(islice(call.orders, call.at_once)):
            made: dict[int, GeneratedImage] = {}
            rows: list[Row] = []
            for place, order in enumerate(orders):
                try:
                    rows.append(Row(place, order, *self._condition(order)))
                except DiptychError as error:
                    made[place] = _failed(call, order, error, self._name)
            # Prompts of another length are run apart: filling up would change their pictures.
            for group in alike(rows):
                batch = self._batch(group)
                yield from self._denoise(batch)
                for row, each in enumerate(group):
                    if (broken := batch.error(row)) is not None:
                        made[each.place] = _failed(call, each.order, broken, self._name)
                if finish:
                    made |= self._finish(call, batch)
            yield from (made[place] for place in sorted(made))

    def _batch(self, rows: Sequence[Row]) -> Batch:
        options = rows[0].order.options
        steps = self._steps(options)
        array = self.networks.array
        negatives = [row.negative for row in rows if row.negative is not None]
        denoise = build_denoiser(
            self.networks["unet"],
            steps,
            stacked([row.positive for row in rows], array),
            stacked(negatives, array) if negatives else None,
            prediction_type=self.schedule.config.prediction_type,
            guidance_scale=options.guidance_scale or 0.0,
            guidance_rescale=options.guidance_rescale or 0.0,
            extra=self._blank_mask(len(rows), options),
        )
        return Batch(rows, steps, denoise, self.networks, self._latent_shape(options))

    def _denoise(self, batch: Batch) -> Iterator[DenoisingStep]:
        steps, orders = batch.steps, tuple(row.order for row in batch.rows)
        total = len(steps.timesteps)
        for step in batch.run():
            is_last = step.index == total - 1
            yield DenoisingStep(
                index=step.index,
                total=total,
                sigma=steps.sigmas[step.index + 1],
                latents=step.latents * steps.final_scale if is_last else step.latents,
                denoised=step.denoised,
                orders=orders,
                _show=self._show,
                _finish=lambda latents, row: self._picture(latents[[row]], orders[row]),
            )

    def _finish(self, call: _Call, batch: Batch) -> dict[int, GeneratedImage]:
        """Decode the pictures that are whole, by their places."""
        made = {}
        for number, row in enumerate(batch.rows):
            if number in batch.broken:
                continue
            try:
                latents = batch.latents[[number]] * batch.steps.final_scale
                made[row.place] = self._picture(latents, row.order)
            except DiptychError as error:
                made[row.place] = _failed(call, row.order, error, self._name)
        return made

    @property
    def _name(self) -> str:
        """Name the model, and what was put into it: both belong to a picture's recipe."""
        return " + ".join(
            [self.model.name, *(f"{each.path.stem}:{each.scale:g}" for each in self._loras)]
        )

    def _picture(self, latents: Array, order: Order) -> GeneratedImage:
        (image,) = self.decode(latents)
        return GeneratedImage(
            image, order.seed, order.prompt, order.options, self._name, order.notes
        )

    def _show(self, denoised: Array) -> list[Image.Image]:
        """Return pictures of latents in full size, without the autoencoder."""
        if self._latent_rgb is None:
            stored = self.model.defaults.get("latent_rgb")
            learned = fit_latent_rgb(self.encode, self.downsampling) if stored is None else stored
            self._latent_rgb = np.asarray(learned, np.float64)
        small = latent_to_rgb(self.networks.numpy(denoised), self._latent_rgb)
        return [
            image.resize(
                (image.width * self.downsampling, image.height * self.downsampling),
                Image.Resampling.BICUBIC,
            )
            for image in small
        ]

    def _condition(self, order: Order) -> tuple[Conditioning, Conditioning | None]:
        """Return what the UNet is told for the prompt, and for the negative one if it counts."""
        options = order.options
        scale = options.guidance_scale or 0.0
        takes = self.networks["unet"].inputs
        is_guided = scale > 1 and "timestep_cond" not in takes
        asked = (order.prompt, options.negative_prompt, is_guided, options.clip_skip)
        pair = self._encode_pair(*asked, options.parse_weights)
        own: dict[str, NDArray[np.float32]] = {}
        if "time_ids" in takes:
            size = (options.height, options.width)
            own["time_ids"] = np.array([[*size, 0, 0, *size]], np.float32)
        if "timestep_cond" in takes:
            width = int(self.model.configs["unet"]["time_cond_proj_dim"])
            own["timestep_cond"] = guidance_embedding(scale, 1, width)
        told = [
            {"encoder_hidden_states": each.encoder_hidden_states, **own}
            | ({"text_embeds": each.pooled} if "text_embeds" in takes else {})
            for each in (pair.positive, pair.negative)
            if each is not None
        ]
        return told[0], told[1] if len(told) > 1 else None

    def _encode_pair(
        self,
        prompt: str,
        negative: str | None,
        is_guided: bool,
        clip_skip: int | None,
        parse_weights: bool,
    ) -> PromptPair:
        """Encode the words, or remember the last ones: pictures of one prompt share them."""
        key = (prompt, negative, is_guided, clip_skip, parse_weights)
        if self._last_words is None or self._last_words[0] != key:
            (pair,) = encode_prompts(
                self.networks,
                self.tokenizers,
                [prompt],
                [negative] if is_guided else None,
                clip_skip=clip_skip or 0,
                parse_weights=parse_weights,
                force_zeros_for_empty_prompt=self.model.force_zeros_for_empty_prompt,
            )
            self._last_words = key, pair
        return self._last_words[1]

    def _blank_mask(self, rows: int, options: GenerateOptions) -> tuple[Array, ...]:
        """Return what a 9-channel UNet is told besides: repaint all of a grey picture."""
        channels = int(self.model.configs["unet"].get("in_channels", self.latent_channels))
        if channels == self.latent_channels:
            return ()
        shape = self._latent_shape(options)
        if channels != 2 * self.latent_channels + 1:
            raise UnsupportedModel(
                f"{self.model.name} takes {channels} channels of latents: diptych generates with "
                f"{self.latent_channels}, or {2 * self.latent_channels + 1} (inpainting)"
            )
        grey = np.zeros((1, 3, *(side * self.downsampling for side in shape[1:])), np.float32)
        array = self.networks.array
        mask = array(np.ones((rows, 1, *shape[1:]), np.float32))
        return mask, array(np.repeat(self.encode(grey), rows, axis=0))


def generate(
    prompt: str | Iterable[str], model: str | Path = "default", **options: Any
) -> GeneratedImage | list[GeneratedImage]:
    """Load `model` and make pictures; see `ImageGenerator.generate` for the options.

    To generate more than once, load an `ImageGenerator` and keep it.
    """
    return ImageGenerator.load(model).generate(prompt, **options)


@dataclass(frozen=True, slots=True)
class _Call:
    """Hold what one call asks for."""

    orders: Iterator[Order]
    at_once: int
    on_error: OnError


def _failed(call: _Call, order: Order, error: DiptychError, model: str) -> GeneratedImage:
    if call.on_error == "raise":
        raise error
    nothing = cast("Image.Image", None)
    return GeneratedImage(
        nothing, order.seed, order.prompt, order.options, model, order.notes, error
    )
