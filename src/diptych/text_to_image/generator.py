"""Generate pictures from words: the object users hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput
from diptych.images import ImageInput
from diptych.runtimes.network import Array, OpenNetworks, open_generator_networks, require_torch
from diptych.text import ClipTokenizer
from diptych.text_to_image.adapters import Adapters
from diptych.text_to_image.autoencoder import Autoencoder
from diptych.text_to_image.calls import Calls, Images
from diptych.text_to_image.editing import is_one_picture
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.options import GenerateOptions
from diptych.text_to_image.orders import is_single
from diptych.text_to_image.painter import Event, OnError, Painter
from diptych.text_to_image.previews import DenoisingStep
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.weights.diffusion import GeneratorFolder, resolve_generator

if TYPE_CHECKING:
    from diptych.weights.adapters import LoraHandle

__all__ = ["GeneratedImage", "ImageGenerator", "OnError", "generate"]


class ImageGenerator:
    """Make pictures from words with a latent diffusion model (Rombach et al. 2022)."""

    def __init__(
        self,
        networks: OpenNetworks,
        tokenizers: Mapping[str, ClipTokenizer],
        model: GeneratorFolder,
    ) -> None:
        self.networks = networks
        self.model = model
        self.schedule = NoiseSchedule(ScheduleConfig(**model.schedule))
        latent_rgb = model.defaults.get("latent_rgb")
        self._autoencoder = Autoencoder(networks, model.configs["vae"], model.name, latent_rgb)
        self._adapters = Adapters(networks, tokenizers, model.name)
        self._painter = Painter(networks, model, self.schedule, self._autoencoder, self._adapters)
        self._calls = Calls(model, self.schedule, self._autoencoder, self._painter)

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
        preview_vae: str | Path | None = None,
    ) -> Self:
        """Load a generator by name: "default", a folder, a single file, or a hub id.

        `runtime` is auto, onnxruntime, openvino or torch; `device` auto, cpu, cuda, …; `dtype`
        auto, float32, bfloat16 or float16. `prediction_type` (epsilon, v_prediction, sample)
        overrules what the checkpoint says, which single files often leave open. With `offload` each
        network is on the GPU for its turn only; None does so where there is too little memory.
        `preview_vae` is that of `load_preview_vae`. Raises `UnknownModel`, `UnsupportedModel`,
        `WeightsMismatch`, `MissingExtra`, or `BadInput` for a combination that cannot be.
        """
        if not isinstance(name_or_path, str | Path):
            raise BadInput(f"a model is given by name or folder, not as {name_or_path!r}")
        seen = sys.stderr is not None and sys.stderr.isatty()
        model = resolve_generator(
            name_or_path, revision=revision, progress=seen, prediction_type=prediction_type
        )
        words = {"runtime": runtime, "device": device, "dtype": dtype}
        generator = cls.from_model(model, **words, offload=offload)
        if preview_vae is not None:
            generator.load_preview_vae(preview_vae)
        return generator

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
    def tokenizers(self) -> Mapping[str, ClipTokenizer]:
        """Return the tokenizers, which know the learned words that are loaded."""
        return self._adapters.tokenizers

    @property
    def downsampling(self) -> int:
        """Return how many pixels a latent stands for, each way."""
        return self._autoencoder.downsampling

    @property
    def latent_channels(self) -> int:
        """Return how many channels the latents have."""
        return self._autoencoder.latent_channels

    @property
    def options(self) -> GenerateOptions:
        """Return the options that hold where the caller sets none: the model's own."""
        return GenerateOptions().resolve(self._calls.defaults)

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
        if num_images_per_prompt is not None:
            overrides["num_images_per_prompt"] = num_images_per_prompt
        call = self._calls.of_words(
            [cast("str", prompt)] if single else prompt,
            options,
            negative_prompt=negative_prompt,
            latents=latents,
            batch_size=batch_size,
            on_error="raise" if single and on_error == "keep" else on_error,
            **overrides,
        )
        return self._collected(self._painter.paint(call), single, "prompts")

    def image_to_image(
        self,
        image: Images,
        prompt: str | Iterable[str] = "",
        options: GenerateOptions | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Array | None = None,
        batch_size: int | None = None,
        on_error: OnError = "keep",
        **overrides: Any,
    ) -> GeneratedImage | list[GeneratedImage]:
        """Make a picture out of another, led by words: one for one, a list for a list.

        `image` is whatever `images.open_image` reads, or a list of it; `overrides` are words of
        `ImageToImageOptions`. `strength` 0 gives the picture as the autoencoder knows it, 1 one
        that owes it nothing: the one `generate` makes. It takes the last int(steps · strength)
        steps, as diffusers does. `latents` [pictures, C, h, w] are the noise that is added.
        Otherwise as `generate`.
        """
        return self._edited(
            *(image, prompt, options),
            negative_prompt=negative_prompt,
            latents=latents,
            batch_size=batch_size,
            on_error=on_error,
            **overrides,
        )

    def inpaint(
        self,
        image: Images,
        mask_image: Images | None = None,
        prompt: str | Iterable[str] = "",
        options: GenerateOptions | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Array | None = None,
        batch_size: int | None = None,
        on_error: OnError = "keep",
        **overrides: Any,
    ) -> GeneratedImage | list[GeneratedImage]:
        """Repaint the part of a picture where the mask is white; the rest comes back bit for bit.

        `mask_image` is one mask for all pictures or one for each; it may be left out with `extend`,
        which enlarges the picture. `overrides` are words of `InpaintOptions`. Networks of 9
        channels see the mask; with others the picture is put back around it at every step.
        `latents` [pictures, C, h, w] are the noise to start from. Otherwise as `generate`.
        """
        return self._edited(
            *(image, prompt, options),
            mask_image=mask_image,
            is_inpainting=True,
            negative_prompt=negative_prompt,
            latents=latents,
            batch_size=batch_size,
            on_error=on_error,
            **overrides,
        )

    def style_transfer(
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
    ) -> GeneratedImage | list[GeneratedImage]:
        """Give a picture the style of another, or the mean of several, without training.

        A list of contents gives a list. `overrides` are words of `StyleOptions`; `style_weights`
        tell how much each style counts. With `mask_image` style goes where it is white, and the
        rest comes back bit for bit, in the content's own size. StyleID (Chung et al. 2024): DDIM
        inversion of all pictures, AdaIN, and self-attention to the style. Raises
        `UnsupportedModel` for a model without self-attention on its way up.
        """
        single = is_one_picture(content)
        on_error = "raise" if single and on_error == "keep" else on_error
        events = self.follow_style(
            *(content, style, options),
            prompt=prompt,
            style_weights=style_weights,
            mask_image=mask_image,
            on_error=on_error,
            **overrides,
        )
        return self._collected(events, single, "pictures")

    def follow_style(
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
    ) -> Iterator[Event]:
        """Yield every step of style transfers and, between them, every finished picture.

        Arguments are those of `style_transfer`; the first half of the steps leads to noise.
        """
        call, weights = self._calls.of_styles(
            *(content, style, options),
            prompt=prompt,
            style_weights=style_weights,
            mask_image=mask_image,
            on_error=on_error,
            **overrides,
        )
        return self._painter.restyle(call, weights)

    def _edited(
        self,
        image: Images,
        prompt: str | Iterable[str],
        options: GenerateOptions | None,
        *,
        on_error: OnError,
        **words: Any,
    ) -> GeneratedImage | list[GeneratedImage]:
        single = is_one_picture(image) and is_single(prompt)
        on_error = "raise" if single and on_error == "keep" else on_error
        call = self._calls.of_pictures(image, prompt, options, on_error=on_error, **words)
        return self._collected(self._painter.paint(call), single, "pictures")

    def _collected(
        self, events: Iterator[Event], single: bool, noun: str
    ) -> GeneratedImage | list[GeneratedImage]:
        made = [event for event in events if isinstance(event, GeneratedImage)]
        if not made:
            raise BadInput(f"the list of {noun} is empty: give at least one")
        return made[0] if single and len(made) == 1 else made

    def images(self, prompts: Iterable[str], *args: Any, **words: Any) -> Iterator[GeneratedImage]:
        """Yield the pictures of a list of prompts, each as soon as it is finished.

        Arguments are those of `generate`; prompts are read as they are needed. With `image=` (and
        `mask_image=`) they are made out of pictures, as `follow` tells.
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
        call = self._calls.of_either(prompt, *args, **words)
        events = self._painter.paint(call, finish=False)
        return (event for event in events if isinstance(event, DenoisingStep))

    def follow(self, prompts: str | Iterable[str], *args: Any, **words: Any) -> Iterator[Event]:
        """Yield every denoising step and, between them, every finished picture, as they come.

        Arguments are those of `generate`; with `image=` those of `image_to_image`, with
        `mask_image=` or `extend=` those of `inpaint`.
        """
        return self._painter.paint(self._calls.of_either(prompts, *args, **words))

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the pictures of latents [B, C, h, w], those of a step or of another program.

        Raises `DiptychError` where a picture would hold numbers that are not finite.
        """
        return self._autoencoder.decode(latents)

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scaled latents [B, C, h, w] of pixels [B, 3, H, W] in -1..1."""
        return self._autoencoder.encode(pixel_values)

    def load_preview_vae(self, folder: str | Path) -> None:
        """Let a tiny VAE make the previews: a folder of diffusers' AutoencoderTiny, as TAESD's.

        Needs the torch extra. Raises `UnknownModel` where there is none, `BadInput` for one of
        another family.
        """
        self._autoencoder.show_with(folder)

    def compile(self, mode: str | None = None) -> None:
        """Let torch.compile make UNet and VAE faster; the first picture of a size waits for it.

        That takes more than a minute for networks of the size of Stable Diffusion 1. Where the
        compiler fails, pictures are made without it, and a warning says why.
        `mode` is None, "reduce-overhead" (CUDA graphs) or "max-autotune". A LoRA may be swapped
        for another of the same layers without compiling anew where it is loaded with `fused`.
        Raises `UnsupportedModel` outside of torch.
        """
        modules = self.networks.to_compile(self.model.name)
        from diptych.runtimes.on_torch_compiled import check_mode, compile_generator

        check_mode(mode)
        compile_generator(modules, mode=mode)

    def load_lora(self, path: str | Path, scale: float = 1.0, *, fused: bool = False) -> LoraHandle:
        """Put a LoRA file into the networks; several add up.

        `scale` 1 is what it was trained for. `fused` adds it to the weights: no slower, but
        the weights as they were are kept besides. Returns a handle with `set_scale`. Raises
        `WeightsMismatch` for a file of another family, `UnsupportedModel` outside of torch.
        """
        return self._adapters.load_lora(path, scale, fused=fused)

    def unload_lora(self, handle: LoraHandle | None = None) -> None:
        """Take one LoRA out, or all: the weights are again what they were, to the bit."""
        self._adapters.unload_lora(handle)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Teach the text encoders a learned word, and return it: `token`, or the file's own.

        Raises `WeightsMismatch` for a file of another family, `BadInput` for a word that is known
        already, `UnsupportedModel` outside of torch.
        """
        return self._adapters.learn(path, token)

    def unload_textual_inversion(self, token: str | None = None) -> None:
        """Forget one learned word, or all."""
        self._adapters.forget(token)

    def save(self, path: str | Path, *, layout: str = "diffusers") -> None:
        """Write the model so that others load it: a folder of diffusers, or with "ldm" one file.

        LoRAs and learned words that are loaded are left out. Needs the torch extra.
        """
        require_torch("saving a checkpoint")
        from diptych.weights.load_generator import load_generator
        from diptych.weights.save_generator import save_generator

        save_generator(load_generator(self.model), self.model, Path(path), layout=layout)

    def export(
        self, folder: str | Path, *, quantize: str | None = None, force: bool = False
    ) -> dict[str, Any]:
        """Write the model as ONNX graphs that run without torch, and compare pictures of both.

        `quantize` stores the weights smaller: "fp16", "int8" or "int4". Returns the content of
        `export.json`. Raises `BadInput` for a folder that is not empty and `QualityLoss` for too
        great a loss, unless `force`. Needs the export extra.
        """
        from diptych.runtimes.conversion import ExportRequest, export_model

        return export_model(self.model, folder, ExportRequest(quantize=quantize, force=force))


def generate(
    prompt: str | Iterable[str], model: str | Path = "default", **options: Any
) -> GeneratedImage | list[GeneratedImage]:
    """Load `model` and make pictures; see `ImageGenerator.generate` for the options.

    To generate more than once, load an `ImageGenerator` and keep it.
    """
    return ImageGenerator.load(model).generate(prompt, **options)
