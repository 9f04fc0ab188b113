"""Caption pictures: the object users hold, and what it hands back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast, overload

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadImage, BadInput
from diptych.image_to_text import decoding
from diptych.image_to_text.batches import is_single, same_size, take
from diptych.image_to_text.caption import Caption, Reading, View, stripped
from diptych.image_to_text.decoder_steps import decoder_step
from diptych.image_to_text.heatmaps import num_image_tokens, patch_grid, tokens_of
from diptych.image_to_text.options import CaptionOptions, SearchOptions
from diptych.images import Alpha, ImageInput, ImageLimits, Preprocessing, preprocess
from diptych.runtimes.conversion import ExportRequest, export_model
from diptych.runtimes.network import BRIDGED, OpenNetworks, open_networks
from diptych.text import Gpt2Tokenizer
from diptych.weights.files import ModelFolder
from diptych.weights.hub import resolve

__all__ = ["Caption", "Captioner", "OnError", "caption"]

OnError = Literal["keep", "raise"]


class Captioner:
    """Describe pictures in words with a ViT encoder and a GPT-2 decoder."""

    def __init__(
        self,
        networks: OpenNetworks,
        tokenizer: Gpt2Tokenizer,
        preprocessing: Preprocessing,
        model: ModelFolder,
    ) -> None:
        self.networks = networks
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.model = model
        generation = model.generation
        self._start = _one_id(generation, "decoder_start_token_id", "bos_token_id", "eos_token_id")
        self._eos = _ids(generation.get("eos_token_id"))
        self._positions = int(model.config["decoder"]["max_position_embeddings"])
        if model.config["bridge"] == "prefix":
            self._positions -= num_image_tokens(model)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "default",
        *,
        runtime: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
    ) -> Self:
        """Load a captioner by name: "default", a folder, or a hub id.

        `runtime` is auto, onnxruntime, openvino or torch; `device` auto, cpu, cuda, …; `dtype`
        auto, float32, bfloat16 or float16. Raises `UnknownModel`, `UnsupportedModel`,
        `WeightsMismatch`, `MissingExtra`, or `BadInput` for a combination that cannot be.
        """
        if not isinstance(name_or_path, str | Path):
            raise BadInput(f"a model is given by name or folder, not as {name_or_path!r}")
        seen = sys.stderr is not None and sys.stderr.isatty()
        model = resolve(name_or_path, revision=revision, progress=seen)
        return cls.from_model(model, runtime=runtime, device=device, dtype=dtype)

    @classmethod
    def from_model(
        cls, model: ModelFolder, *, runtime: str = "auto", device: str = "auto", dtype: str = "auto"
    ) -> Self:
        """Load a captioner from a folder that was already looked into."""
        networks = open_networks(model, runtime=runtime, device=device, dtype=dtype)
        tokenizer = Gpt2Tokenizer.load(model.tokenizer)
        return cls(networks, tokenizer, Preprocessing.from_config(model.preprocessing), model)

    @property
    def options(self) -> CaptionOptions:
        """Return the options that hold where the caller sets none: the model's own."""
        return CaptionOptions().resolve(self.model.generation)

    def compile(self, mode: str | None = None) -> None:
        """Let torch.compile make encoder and decoder faster; the first captions wait for it.

        Where the compiler fails, captions are made without it, and a warning says why. `mode` is
        None or "default". Raises `UnsupportedModel` outside of torch.
        """
        modules = self.networks.to_compile(self.model.name)
        if mode not in (None, "default"):
            # A caption grows by a word each step: CUDA graphs would be recorded for every length.
            raise BadInput(f"mode is {mode!r}: captioners compile in mode None or 'default'")
        from diptych.runtimes.on_torch_compiled import compile_captioner

        compile_captioner(modules["captioner"], mode=mode)

    @overload
    def caption(
        self,
        images: ImageInput,
        options: CaptionOptions | None = ...,
        *,
        batch_size: int = ...,
        on_error: OnError = ...,
        alpha: Alpha = ...,
        limits: ImageLimits = ...,
        allow_urls: bool = ...,
        **overrides: Any,
    ) -> Caption: ...

    @overload
    def caption(
        self,
        images: Iterable[ImageInput],
        options: CaptionOptions | None = ...,
        *,
        batch_size: int = ...,
        on_error: OnError = ...,
        alpha: Alpha = ...,
        limits: ImageLimits = ...,
        allow_urls: bool = ...,
        **overrides: Any,
    ) -> list[Caption]: ...

    def caption(
        self,
        images: ImageInput | Iterable[ImageInput],
        options: CaptionOptions | None = None,
        *,
        batch_size: int = 8,
        on_error: OnError = "keep",
        alpha: Alpha = "white",
        limits: ImageLimits | None = None,
        allow_urls: bool = False,
        **overrides: Any,
    ) -> Caption | list[Caption]:
        """Caption one picture, or each of a list.

        `overrides` are words of `CaptionOptions` and win over `options`. A single picture that
        cannot be read raises `BadImage`; in a list its place holds a `Caption` with `error` set
        and the others go on, unless `on_error="raise"`.
        """
        single = is_single(images)
        several: list[Any] = [images] if single else [*cast("Iterable[ImageInput]", images)]
        if not several:
            raise BadInput("the list of images is empty: give at least one picture")
        made = list(
            self.captions(
                several,
                options,
                batch_size=batch_size,
                on_error="raise" if single else on_error,
                alpha=alpha,
                limits=limits,
                allow_urls=allow_urls,
                **overrides,
            )
        )
        return made[0] if single else made

    def captions(
        self,
        images: Iterable[ImageInput],
        options: CaptionOptions | None = None,
        *,
        batch_size: int = 8,
        on_error: OnError = "keep",
        alpha: Alpha = "white",
        limits: ImageLimits | None = None,
        allow_urls: bool = False,
        **overrides: Any,
    ) -> Iterator[Caption]:
        """Yield the caption of each picture in order, reading `batch_size` pictures at a time.

        As `caption` with a list, for collections that do not fit in memory.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise BadInput(f"batch_size is {batch_size!r}: give a whole number of 1 or more")
        if on_error not in ("keep", "raise"):
            raise BadInput(f"on_error is {on_error!r}: give 'keep' or 'raise'")
        resolved = self._resolve(options, overrides)
        self._search_options(resolved)  # a wrong length is told before any picture is read
        reading = _reading(alpha, limits, allow_urls)
        return self._caption_all(iter(images), resolved, batch_size, on_error, reading)

    def stream(
        self,
        image: ImageInput,
        options: CaptionOptions | None = None,
        *,
        alpha: Alpha = "white",
        limits: ImageLimits | None = None,
        allow_urls: bool = False,
        **overrides: Any,
    ) -> Iterator[str]:
        """Yield the caption of one picture piece by piece, as soon as each is certain.

        The pieces add up to `caption(image, …).text`. Greedy search and sampling settle every
        word at once; beam search settles those that all beams share.
        """
        resolved = self._resolve(options, overrides)
        if _returned(resolved) > 1:
            raise BadInput(
                f"num_return_sequences is {resolved.num_return_sequences}, but only one caption "
                "can be streamed: give num_return_sequences=1"
            )
        search_options, prompt = self._search_options(resolved)
        reading = _reading(alpha, limits, allow_urls)
        pixels = self._pixels(image, reading)
        return self._stream(pixels, resolved, search_options, prompt)

    def save(self, folder: str | Path) -> None:
        """Write the model as a checkpoint that transformers loads too. Needs the torch extra."""
        from diptych.runtimes.network import require_torch

        require_torch("saving a checkpoint")
        from diptych.weights.load import load_captioner
        from diptych.weights.save import save_captioner

        save_captioner(
            load_captioner(self.model),
            Path(folder),
            preprocessing=self.preprocessing.to_config(),
            generation=self.model.generation,
            tokenizer=self.model.tokenizer,
        )

    def export(
        self,
        folder: str | Path,
        *,
        quantize: str | None = None,
        images: Sequence[ImageInput] | None = None,
        force: bool = False,
    ) -> dict[str, Any]:
        """Write the model as ONNX graphs that run without torch, and compare the words of both.

        `quantize` is None, "fp16", "int8" or "int4". `images` are pictures to compare on; without
        them seeded ones are made. Returns the content of `export.json`. Raises `BadInput` for a
        folder that is not empty and `QualityLoss` for too great a loss, unless `force`. Needs the
        export extra.
        """
        request = ExportRequest(quantize=quantize, images=images, force=force)
        return export_model(self.model, folder, request)

    # Hops of a caption ------------------------------------------------------------------------

    def _resolve(
        self, options: CaptionOptions | None, overrides: Mapping[str, Any]
    ) -> CaptionOptions:
        if not isinstance(options, CaptionOptions | None):
            raise BadInput(
                f"options is {options!r}: give CaptionOptions(…), or its words by keyword"
            )
        asked = (options or CaptionOptions()).replace(**overrides)
        return asked.resolve(self.model.generation)

    def _search_options(self, options: CaptionOptions) -> tuple[SearchOptions, tuple[int, ...]]:
        prompt = (self._start, *self.tokenizer.encode(options.prompt.rstrip()))
        return options.for_search(len(prompt), self._positions), prompt

    def _pixels(self, image: ImageInput, reading: Reading) -> NDArray[np.float32]:
        return preprocess(
            image,
            self.preprocessing,
            alpha=reading.alpha,
            limits=reading.limits,
            allow_urls=reading.allow_urls,
        )

    def _caption_all(
        self,
        images: Iterator[ImageInput],
        options: CaptionOptions,
        batch_size: int,
        on_error: OnError,
        reading: Reading,
    ) -> Iterator[Caption]:
        done = 0
        while batch := take(images, batch_size):
            captions: list[Caption | None] = [None] * len(batch)
            read: list[tuple[int, NDArray[np.float32]]] = []
            for place, image in enumerate(batch):
                try:
                    read.append((place, self._pixels(image, reading)))
                except BadImage as error:
                    if on_error == "raise":
                        raise
                    captions[place] = Caption("", options=options, error=error)
            for group in same_size(read):
                places = [place for place, _ in group]
                own = options
                if options.seed is not None:
                    # Image i draws from stream seed + i, whatever the batches.
                    own = options.replace(seed=options.seed + done)
                found = self._search([pixels for _, pixels in group], own, places)
                for place, hypotheses in zip(places, found, strict=True):
                    view = View(self, batch[place], reading)
                    if own.seed is not None:
                        own = options.replace(seed=(options.seed or 0) + done + place)
                    captions[place] = self._caption(hypotheses, own, view)
            done += len(batch)
            yield from (caption for caption in captions if caption is not None)

    def _search(
        self, pixels: list[NDArray[np.float32]], options: CaptionOptions, places: list[int]
    ) -> list[list[decoding.Hypothesis]]:
        search_options, prompt = self._search_options(options)
        if options.do_sample and places != list(range(len(places))):
            # Unreadable neighbours must not shift the streams of the others.
            return [
                self._search([own], options.replace(seed=(options.seed or 0) + place), [0])[0]
                for own, place in zip(pixels, places, strict=True)
            ]
        return decoding.search(
            self._step(np.stack(pixels)),
            num_images=len(pixels),
            prompt_ids=prompt,
            options=search_options,
            eos_token_ids=self._eos,
        )

    def _step(self, pixel_values: NDArray[np.float32]) -> decoding.Step:
        (bridged,) = self.networks["encoder"](pixel_values=pixel_values)
        return decoder_step(self.networks["decoder"], self.model.config["bridge"], bridged)

    def _stream(
        self,
        pixels: NDArray[np.float32],
        options: CaptionOptions,
        search_options: SearchOptions,
        prompt: tuple[int, ...],
    ) -> Iterator[str]:
        pieces = decoding.stream(
            self._step(pixels[None]),
            prompt_ids=prompt,
            options=search_options,
            eos_token_ids=self._eos,
        )

        def token_ids() -> Iterator[int]:
            yield from prompt[1:]
            for piece in pieces:
                yield from piece

        text = self.tokenizer.stream(token_ids())
        return stripped(text) if options.strip else text

    def _caption(
        self, hypotheses: list[decoding.Hypothesis], options: CaptionOptions, view: View
    ) -> Caption:
        prompt = self.tokenizer.encode(options.prompt.rstrip())
        captions = []
        for hypothesis in hypotheses:
            text = self.tokenizer.decode([*prompt, *hypothesis.token_ids])
            captions.append(
                Caption(
                    text=text.strip() if options.strip else text,
                    token_ids=hypothesis.token_ids,
                    score=hypothesis.score,
                    token_logprobs=hypothesis.token_logprobs,
                    options=options,
                    _view=view,
                )
            )
        best, *others = captions
        if not others:
            return best
        return Caption(
            best.text,
            best.token_ids,
            best.score,
            best.token_logprobs,
            tuple(others),
            options,
            None,
            view,
        )

    def look(self, caption: Caption, view: View, word: str | int | None) -> NDArray[np.float32]:
        prompt = self.tokenizer.encode(caption.options.prompt.rstrip()) if caption.options else []
        written = [*prompt, *caption.token_ids]
        chosen = tokens_of(self.tokenizer, caption, written, word)
        bridge = self.model.config["bridge"]
        (bridged,) = self.networks["encoder"](
            pixel_values=self._pixels(view.image, view.reading)[None]
        )
        # Token t was chosen from the position before it, which is input t behind the start token.
        (seen,) = self.networks["decoder"](
            ("image_attention",),
            input_ids=np.array([[self._start, *written[:-1]]], np.int64),
            past_key_values=None,
            **{BRIDGED[bridge]: bridged},
        )
        patches = patch_grid(self.model)
        weights = np.asarray(seen, np.float32)[0, chosen].mean(0)
        grid: NDArray[np.float32] = weights[-patches[0] * patches[1] :].reshape(patches)
        return grid


def caption(
    images: ImageInput | Iterable[ImageInput], model: str | Path = "default", **options: Any
) -> Caption | list[Caption]:
    """Load `model` and caption one picture or a list; see `Captioner.caption` for the options.

    To caption more than once, load a `Captioner` and keep it.
    """
    return Captioner.load(model).caption(images, **options)


def _reading(alpha: Alpha, limits: ImageLimits | None, allow_urls: bool) -> Reading:
    if not isinstance(limits, ImageLimits | None):
        raise BadInput(f"limits is {limits!r}: give ImageLimits(…)")
    return Reading(alpha, limits or ImageLimits(), bool(allow_urls))


def _returned(options: CaptionOptions) -> int:
    return options.num_return_sequences or 1


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (int(value),)


def _one_id(generation: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if ids := _ids(generation.get(name)):
            return ids[0]
    raise BadInput(f"the model's generation config names no start token: set {names[0]} in it")
