"""Carry out orders: words and pictures to latents, the sampler's steps, latents to pictures."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput, DiptychError, UnsupportedModel
from diptych.masks import at_latents
from diptych.runtimes.network import Array, OpenNetworks
from diptych.text_to_image.adapters import Adapters
from diptych.text_to_image.autoencoder import Autoencoder
from diptych.text_to_image.batch import Batch, Conditioning, Row, alike, stacked
from diptych.text_to_image.denoiser import (
    Denoise,
    KeepOutside,
    build_denoiser,
    guidance_embedding,
)
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.options import GenerateOptions, parse_interval
from diptych.text_to_image.orders import Order, Source
from diptych.text_to_image.previews import DenoisingStep
from diptych.text_to_image.prompts import PromptPair, encode_prompts
from diptych.text_to_image.reuse import FeatureReuse
from diptych.text_to_image.schedules import NoiseSchedule, Steps
from diptych.text_to_image.style import Stylist
from diptych.text_to_image.style_options import StyleOptions
from diptych.weights.diffusion import GeneratorFolder

__all__ = ["Call", "Event", "OnError", "Painter"]

OnError = Literal["keep", "raise"]
Event = DenoisingStep | GeneratedImage

# Latent pixels that are worked on at once where the caller does not say how many pictures.
_LATENT_PIXELS = {"cpu": 64 * 64, "gpu": 4 * 64 * 64}
_MOST_AT_ONCE = 8
_TAKE_ETA = ("ddim", "dpmpp_2m", "dpmpp_2m_sde")


@dataclass(frozen=True, slots=True)
class Call:
    """Hold what one call asks for; `at_once` None makes as many pictures at once as fit."""

    orders: Iterator[Order]
    at_once: int | None
    on_error: OnError


class Painter:
    """Make the pictures of a call with the networks of one model."""

    def __init__(
        self,
        networks: OpenNetworks,
        model: GeneratorFolder,
        schedule: NoiseSchedule,
        autoencoder: Autoencoder,
        adapters: Adapters,
    ) -> None:
        self._networks, self._model, self._schedule = networks, model, schedule
        self._autoencoder, self._adapters = autoencoder, adapters
        self._last_words: tuple[tuple[object, ...], PromptPair] | None = None

    def paint(self, call: Call, *, finish: bool = True) -> Iterator[Event]:
        """Yield every denoising step and, between them, every finished picture, in order."""
        while orders := self._some(call):
            made: dict[int, GeneratedImage] = {}
            rows: list[Row] = []
            for place, order in enumerate(orders):
                try:
                    rows.append(self._row(place, order))
                except DiptychError as error:
                    made[place] = self._failed(call, order, error)
            # Prompts of another length are run apart: filling up would change their pictures.
            for group in alike(rows):
                batch = self._batch(group)
                yield from self._denoise(batch)
                for row, each in enumerate(group):
                    if (broken := batch.error(row)) is not None:
                        made[each.place] = self._failed(call, each.order, broken)
                if finish:
                    made |= self._finish(call, batch)
            yield from (made[place] for place in sorted(made))

    def restyle(self, call: Call, weights: Sequence[float]) -> Iterator[Event]:
        """Yield every step of style transfers, there and back, and every finished picture.

        `weights` tell how much each style counts.
        """
        stylist = Stylist(
            self._networks, self._model.configs["unet"], self._schedule, self._autoencoder
        )
        for order in call.orders:
            try:
                if order.error is not None:
                    raise order.error
                latents = yield from self._restyle(stylist, order, weights)
                yield self._picture(latents, order)
            except DiptychError as error:
                yield self._failed(call, order, error)

    def steps(self, options: GenerateOptions) -> Steps:
        """Return all the steps of a run; raises `BadInput` for options that do not go together."""
        assert options.sampler is not None and options.num_inference_steps is not None
        steps = self._schedule.steps(
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

    def check(self, options: GenerateOptions) -> None:
        """Raise `BadInput` or `UnsupportedModel` for what this model cannot be asked for."""
        self.steps(options)
        if options.reuse_interval > 1 and "unet_shallow" not in self._networks:
            # An export holds one shallow network: that of its weights without a LoRA.
            mend = "" if self._model.lora else "export it anew, or "
            raise UnsupportedModel(
                f"{self._model.name} has no unet_shallow.onnx, which reuse_interval needs: {mend}"
                "load it with runtime='torch'"
            )
        if options.token_merging_ratio and self._networks.runtime != "torch":
            raise UnsupportedModel(
                f"token_merging_ratio needs runtime='torch', and {self._model.name} runs in "
                f"{self._networks.runtime}: load it so, or leave the option out"
            )

    def condition(self, order: Order) -> tuple[Conditioning, Conditioning | None]:
        """Return what the UNet is told for the prompt, and for the negative one if it counts."""
        options = order.options
        scale = options.guidance_scale or 0.0
        takes = self._networks["unet"].inputs
        is_guided = scale > 1 and "timestep_cond" not in takes
        asked = (order.prompt, options.negative_prompt, is_guided, options.clip_skip)
        pair = self._encode_pair(*asked, options.parse_weights)
        own: dict[str, NDArray[np.float32]] = {}
        if "time_ids" in takes:
            size = (options.height, options.width)
            own["time_ids"] = np.array([[*size, 0, 0, *size]], np.float32)
        if "timestep_cond" in takes:
            width = int(self._model.configs["unet"]["time_cond_proj_dim"])
            own["timestep_cond"] = guidance_embedding(scale, 1, width)
        told = [
            {"encoder_hidden_states": each.encoder_hidden_states, **own}
            | ({"text_embeds": each.pooled} if "text_embeds" in takes else {})
            for each in (pair.positive, pair.negative)
            if each is not None
        ]
        return told[0], told[1] if len(told) > 1 else None

    def _restyle(
        self, stylist: Stylist, order: Order, weights: Sequence[float]
    ) -> Generator[DenoisingStep, None, Array]:
        """Yield the steps of one style transfer and return its latents."""
        assert order.source is not None and isinstance(order.options, StyleOptions)
        plain = replace(order, prompt="", options=order.options.replace(guidance_scale=0.0))
        empty, _ = self.condition(plain)
        prompt, negative = self.condition(order) if order.prompt.strip() else (None, None)
        if prompt is not None:
            # A long prompt takes several chunks of words: as many of none stand beside it.
            words = "encoder_hidden_states"
            longer = prompt[words].shape[1] // empty[words].shape[1]
            empty = {**empty, words: np.tile(empty[words], (1, longer, 1))}
        source, latents = order.source, None
        run = stylist.run(
            source.pixel_values, weights, order.options, (empty, prompt, negative), source.mask
        )
        for index, total, sigma, step in run:
            latents = step.latents
            yield DenoisingStep(
                index=index,
                total=total,
                sigma=sigma,
                latents=step.latents,
                denoised=step.denoised,
                orders=(order,),
                _show=self._autoencoder.show,
                _finish=lambda latents, row: self._picture(latents[[row]], order),
            )
        return latents

    # Hops of a picture ------------------------------------------------------------------------

    def _some(self, call: Call) -> list[Order]:
        """Take the orders that are worked on at once."""
        room = _LATENT_PIXELS["cpu" if self._networks.device == "cpu" else "gpu"]
        orders: list[Order] = []
        for order in call.orders:
            orders.append(order)
            _, height, width = self._latent_shape(order.options)
            room -= height * width
            is_full = room < height * width or len(orders) == _MOST_AT_ONCE
            if is_full if call.at_once is None else len(orders) == call.at_once:
                break
        return orders

    def _latent_shape(self, options: GenerateOptions) -> tuple[int, int, int]:
        assert options.width is not None and options.height is not None
        down = self._autoencoder.downsampling
        return self._autoencoder.latent_channels, options.height // down, options.width // down

    def _row(self, place: int, order: Order) -> Row:
        if order.error is not None:
            raise order.error
        shape = self._latent_shape(order.options)
        if order.noise is not None and order.noise.shape != shape:
            raise BadInput(
                f"latents are noise of the shape {list(order.noise.shape)}, but this picture is "
                f"drawn from {list(shape)}: give width and height that fit it"
            )
        row = Row(place, order, *self.condition(order))
        source, takes_mask, encode = order.source, self.takes_mask(), self._autoencoder.encode
        everywhere = np.ones(self._pixels(order.options), np.float32)
        if source is None:
            if not takes_mask:
                return row
            # What a 9-channel UNet is told where there is no picture: repaint all of a grey one.
            source = Source(np.zeros((3, *everywhere.shape), np.float32), everywhere)
        else:
            row = replace(row, image_latents=encode(source.pixel_values[None]))
        if source.mask is None and not takes_mask:
            return row
        mask = everywhere if source.mask is None else source.mask
        small = at_latents(mask, self._autoencoder.downsampling, is_soft=source.is_soft)
        row = replace(row, mask=small[None, None])
        if not takes_mask:
            return row
        # Mid-grey where it is to be painted: what these networks were trained with.
        kept = (source.pixel_values[None] * (mask < 0.5)).astype(np.float32)
        return replace(row, masked_latents=encode(kept))

    def _pixels(self, options: GenerateOptions) -> tuple[int, int]:
        assert options.width is not None and options.height is not None
        return options.height, options.width

    def takes_mask(self) -> bool:
        """Tell a UNet that is told where to paint, by 9 channels, from an ordinary one."""
        own = self._autoencoder.latent_channels
        channels = int(self._model.configs["unet"].get("in_channels", own))
        if channels not in (own, 2 * own + 1):
            raise UnsupportedModel(
                f"{self._model.name} takes {channels} channels of latents: diptych generates with "
                f"{own}, or {2 * own + 1} (inpainting)"
            )
        return channels != own

    def _batch(self, rows: Sequence[Row]) -> Batch:
        orders = [row.order for row in rows]
        options = orders[0].options
        steps = self.steps(options)
        source = NoiseSource([order.seed for order in orders], options.noise_source)
        given = [order.noise for order in orders if order.noise is not None]
        noise = np.stack(given) if given else source.draw(self._latent_shape(options))
        array = self._networks.array
        start = array((noise * steps.initial_scale).astype(np.float32))
        latents = [row.image_latents for row in rows if row.image_latents is not None]
        if latents and options.strength is not None and options.strength < 1:
            steps = steps.after(options.strength)
            spread = steps.sigmas[0] if steps.timesteps else 0.0
            start = array(np.concatenate(latents) + (noise * spread).astype(np.float32))
        denoise, finish = self._denoiser(rows, steps), None
        if latents and (mask := self._kept_by_latents(rows)) is not None:
            parts = array(mask), array(np.concatenate(latents)), array(noise)
            is_soft = any(order.source is not None and order.source.is_soft for order in orders)
            denoise = KeepOutside(denoise, steps, *parts, is_soft=is_soft)
            finish = denoise.finish
        return Batch(rows, steps, denoise, self._networks, start, source, finish=finish)

    def _denoiser(self, rows: Sequence[Row], steps: Steps) -> Denoise:
        options, array = rows[0].order.options, self._networks.array
        negatives = [row.negative for row in rows if row.negative is not None]
        extra = [
            array(
                np.concatenate([part for row in rows if (part := getattr(row, name)) is not None])
            )
            for name in ("mask", "masked_latents")
            if rows[0].masked_latents is not None
        ]
        if extra and any(row.order.source and row.order.source.is_soft for row in rows):
            extra[0] = (extra[0] > 0.5) * (extra[0] * 0 + 1)
        return build_denoiser(
            self._networks["unet"],
            steps,
            stacked([row.positive for row in rows], array),
            stacked(negatives, array) if negatives else None,
            prediction_type=self._schedule.config.prediction_type,
            guidance_scale=options.guidance_scale or 0.0,
            guidance_rescale=options.guidance_rescale or 0.0,
            guidance_interval=parse_interval(options.guidance_interval or "0,1"),
            extra=extra,
            reuse=self._reuse(options),
            token_merging_ratio=options.token_merging_ratio,
        )

    def _reuse(self, options: GenerateOptions) -> FeatureReuse | None:
        """Return what runs the UNet where its deep features are used again."""
        if options.reuse_interval == 1:
            return None
        networks = self._networks
        return FeatureReuse(networks["unet"], networks["unet_shallow"], options.reuse_interval)

    def _kept_by_latents(self, rows: Sequence[Row]) -> NDArray[np.float32] | None:
        """Return the masks [B, 1, h, w] outside of which latents are put back at every step.

        None where a 9-channel network knows them itself, unless they are soft.
        """
        sources = [row.order.source for row in rows]
        if not any(source and source.mask is not None for source in sources):
            return None
        if rows[0].masked_latents is not None and not any(s and s.is_soft for s in sources):
            return None
        return np.concatenate([row.mask for row in rows if row.mask is not None])

    def _denoise(self, batch: Batch) -> Iterator[DenoisingStep]:
        steps, orders = batch.steps, tuple(row.order for row in batch.rows)
        total = len(steps.timesteps)
        for step in batch.run():
            is_last = step.index == total - 1
            yield DenoisingStep(
                index=step.index,
                total=total,
                sigma=steps.sigmas[step.index + 1],
                latents=batch.finished if is_last else step.latents,
                denoised=step.denoised,
                orders=orders,
                _show=self._autoencoder.show,
                _finish=lambda latents, row: self._picture(latents[[row]], orders[row]),
            )

    def _finish(self, call: Call, batch: Batch) -> dict[int, GeneratedImage]:
        """Decode the pictures that are whole, by their places."""
        made = {}
        for number, row in enumerate(batch.rows):
            if number in batch.broken:
                continue
            try:
                made[row.place] = self._picture(batch.finished[[number]], row.order)
            except DiptychError as error:
                made[row.place] = self._failed(call, row.order, error)
        return made

    def _picture(self, latents: Array, order: Order) -> GeneratedImage:
        (image,) = self._autoencoder.decode(latents)
        if order.source is not None:
            image = order.source.finish(image)
        return GeneratedImage(
            image, order.seed, order.prompt, order.options, self._adapters.label, order.notes
        )

    def _failed(self, call: Call, order: Order, error: DiptychError) -> GeneratedImage:
        if call.on_error == "raise":
            raise error
        nothing = cast("Image.Image", None)
        label = self._adapters.label
        return GeneratedImage(
            nothing, order.seed, order.prompt, order.options, label, order.notes, error
        )

    def _encode_pair(
        self,
        prompt: str,
        negative: str | None,
        is_guided: bool,
        clip_skip: int | None,
        parse_weights: bool,
    ) -> PromptPair:
        """Encode the words, or remember the last ones: pictures of one prompt share them."""
        adapters = self._adapters
        key = (prompt, negative, is_guided, clip_skip, parse_weights, adapters.state)
        if self._last_words is None or self._last_words[0] != key:
            (pair,) = encode_prompts(
                self._networks,
                adapters.tokenizers,
                [prompt],
                [negative] if is_guided else None,
                clip_skip=clip_skip or 0,
                parse_weights=parse_weights,
                force_zeros_for_empty_prompt=self._model.force_zeros_for_empty_prompt,
            )
            self._last_words = key, pair
        return self._last_words[1]
