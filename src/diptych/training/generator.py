"""Teach a generator: its weights, a LoRA, a subject (DreamBooth) or a word (textual inversion)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diptych.canvas import to_pixel_values
from diptych.errors import BadInput, UnsupportedModel
from diptych.models.clip_text import Layer as TextLayer
from diptych.models.layers import ResnetBlock
from diptych.models.lora import LowRank
from diptych.models.unet import SpatialTransformer, UNet
from diptych.models.vae import Vae
from diptych.runtimes.on_torch_generator import generator_networks
from diptych.text_to_image.denoiser import training_target, training_weight
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.generator import ImageGenerator
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.training.buckets import Plan, Size, bucket_of, bucket_sizes
from diptych.training.cache import TensorCache, cache_key
from diptych.training.data import Item
from diptych.training.learned_words import LearnedWords, learn_word
from diptych.training.loop import Validation
from diptych.training.lora import add_updates, choose_layers
from diptych.training.memory import checkpoint_blocks
from diptych.training.optimizers import Group
from diptych.training.options import GeneratorTrainOptions
from diptych.training.parallel import Workers
from diptych.weights.generator_files import GeneratorFolder
from diptych.weights.save_adapters import save_embedding, save_lora
from diptych.weights.save_generator import save_generator

__all__ = ["GeneratorTask", "generator_defaults"]

logger = logging.getLogger("diptych")

_BANDS = 4  # of timesteps, each measured by itself
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_RATES = {"full": 1e-5, "lora": 1e-4, "dreambooth": 5e-6, "textual-inversion": 5e-4}
_RANK = 8
# What the word is shown in (after the templates of Gal et al. 2022, appendix; own choice of them).
_TEMPLATES = {
    "object": (
        *("a photo of {}", "a picture of {}", "a close-up photo of {}", "a good photo of {}"),
        *("a bright photo of {}", "a photo of one {}", "a cropped photo of {}", "a drawing of {}"),
    ),
    "style": (
        *("a picture in the style of {}", "a painting in the style of {}"),
        *("a rendering in the style of {}", "a small drawing in the style of {}"),
    ),
}


def generator_defaults(options: GeneratorTrainOptions, model: GeneratorFolder) -> dict[str, Any]:
    """Return what holds for this method and model where the user says nothing."""
    method = "lora" if options.is_lora else options.method
    is_small = model.family == "diptych"
    learns_words = options.method in ("dreambooth", "textual-inversion")
    return {
        # The default generator is a hundred times smaller than what these rates were found on.
        "learning_rate": _RATES[method] * (5 if is_small else 1),
        "resolution": int(model.defaults.get("width", 512)),
        "caption_dropout": 0.0 if learns_words else 0.1,
        "validation_fraction": 0.0 if learns_words else None,
    }


@dataclass(frozen=True, slots=True)
class _Draw:
    """Hold what one row of a batch shows."""

    item: Item
    caption: str
    is_flipped: bool
    seed: tuple[int, ...]
    timestep: int
    weight: float = 1.0


class GeneratorTask:
    """Learn to paint what is shown, by the loss of the denoiser that paints."""

    def __init__(
        self,
        model: GeneratorFolder,
        modules: Mapping[str, nn.Module],
        train: Sequence[Item],
        validation: Sequence[Item],
        options: GeneratorTrainOptions,
        folder: Path,
        *,
        device: torch.device,
        workers: Workers,
        fingerprint: str,
        note: Callable[[str], None] = logger.info,
    ) -> None:
        """Prepare a run; `options` are resolved, `modules` on `device` in float32."""
        self.model, self.options, self.folder, self.device = model, options, folder, device
        self.modules = dict(modules)
        self.workers, self._note = workers, note
        self._unet, self._vae = cast(UNet, modules["unet"]), cast(Vae, modules["vae"])
        _check(model, self._vae)
        if options.save_single_file and (model.family == "diptych" or options.method != "full"):
            raise BadInput(
                "save_single_file is for all weights (method='full') of a Stable Diffusion model: "
                "leave it out"
            )
        self.schedule = NoiseSchedule(ScheduleConfig(**model.schedule))
        self._texts = {n: m for n, m in modules.items() if n.startswith("text_encoder")}
        self._tokenizers = {name: files.open() for name, files in model.tokenizers.items()}
        self._cache = _Cache(self, folder / "cache")
        self._updates: dict[tuple[str, str], LowRank] = {}
        self._words: dict[str, LearnedWords] = {}
        # Drawn before anything learns.
        self._class_items = self._draw_class_images()
        for module in modules.values():
            module.requires_grad_(False).eval()
        self.groups: Sequence[Group] = self._choose()
        self._trains_text = options.train_text_encoder or bool(self._words)
        if options.gradient_checkpointing:
            checkpoint_blocks(self._unet, (ResnetBlock, SpatialTransformer))
            for encoder in self._texts.values():
                checkpoint_blocks(encoder, (TextLayer,))
        sizes = self._sizes()
        self._size_of = {
            each.digest: bucket_of((each.width, each.height), sizes)
            for each in (*train, *validation, *self._class_items)
        }
        self._train = list(train)
        self._held = sorted(validation, key=lambda e: e.digest)[: options.num_validation_images]
        self._plan = self._planned(self._train, options.seed)
        self._class_plan = (
            self._planned(self._class_items, options.seed + 1) if self._class_items else None
        )
        self.batches_per_epoch = self._plan.batches_per_epoch
        self.fingerprint = fingerprint
        self._generator: ImageGenerator | None = None
        self._encode_ahead()

    def _planned(self, items: Sequence[Item], seed: int) -> Plan:
        return Plan(
            [self._size_of[each.digest] for each in items],
            self.options.train_batch_size,
            seed,
            [each.repeats for each in items],
        )

    def _sizes(self) -> Sequence[Size]:
        assert self.options.resolution is not None
        step = _side_step(self._unet, self._vae)
        # Sizes that Stable Diffusion knows are multiples of 64.
        step = max(step, 64) if self.options.resolution >= 256 else step
        sizes = bucket_sizes(self.options.resolution, step)
        if self.options.buckets:
            return sizes
        square = max(step, self.options.resolution // step * step)
        return ((square, square),)

    # --- what learns --------------------------------------------------------------------------

    def _choose(self) -> list[Group]:
        """Choose the parameters that learn, in float32, and leave all others as they are."""
        options = self.options
        assert options.learning_rate is not None
        half = _DTYPES.get(options.mixed_precision)
        learning = ["unet", *(self._texts if options.train_text_encoder else ())]
        if half is not None:
            # Weights that do not learn are kept in half the room; the autoencoder may overflow.
            for name, module in self.modules.items():
                if name != "vae" and (options.is_lora or name not in learning or self._is_word):
                    module.to(half)
        if options.method == "textual-inversion":
            assert options.placeholder_token is not None
            self._words, self._tokenizers = learn_word(
                self._texts,
                self._tokenizers,
                options.placeholder_token,
                initializer=options.initializer_token,
                num_vectors=options.num_vectors,
                seed=options.seed,
            )
            named = {f"{name}.vectors": each.vectors for name, each in self._words.items()}
            return [Group(named, options.learning_rate)]
        if options.is_lora:
            chosen = choose_layers({n: self.modules[n] for n in learning}, options.lora_layers)
            self._updates = add_updates(chosen, options.rank or _RANK, options.alpha, options.seed)
            parameters = {
                f"{network}.{path}.{kind}": matrix
                for (network, path), update in self._updates.items()
                for kind, matrix in (("lora_A", update.down), ("lora_B", update.up))
            }
        else:
            parameters = {
                f"{network}.{name}": each
                for network in learning
                for name, each in self.modules[network].named_parameters()
            }
        for each in parameters.values():
            each.requires_grad_(True)
        text_rate = options.text_encoder_learning_rate or options.learning_rate
        groups = [
            Group({n: p for n, p in parameters.items() if n.startswith("unet.")},
                  options.learning_rate),
            Group({n: p for n, p in parameters.items() if not n.startswith("unet.")}, text_rate),
        ]  # fmt: skip
        return [group for group in groups if group.parameters]

    @property
    def _is_word(self) -> bool:
        return self.options.method == "textual-inversion"

    def _draw_class_images(self) -> list[Item]:
        """Let the model draw its idea of the class, or find what it drew before."""
        options = self.options
        if options.method != "dreambooth" or not options.class_prompt:
            return []
        from diptych.training.data import prepare

        folder = self.folder / "class_images"
        folder.mkdir(parents=True, exist_ok=True)
        missing = [n for n in range(options.num_class_images)
                   if not (folder / f"{n:05}.png").is_file()]  # fmt: skip
        if missing and self.workers.leads:
            self._note(f"drawing {len(missing)} pictures of the class {options.class_prompt!r}")
            generator = self._painter()
            for number in missing:
                seed = (options.seed * 100_003 + number) % 2**63
                drawn = self._drawn(generator, options.class_prompt, seed)
                drawn.save(folder / f"{number:05}.png")
        self.workers.wait()
        found = prepare(folder, validation_fraction=0.0, needs_captions=False)
        return list(found.train)[: options.num_class_images]

    # --- batches ------------------------------------------------------------------------------

    def rate(self, step: int) -> float:
        """Return 1: all steps are of one kind."""
        return 1.0

    def losses(self, number: int, rows: slice) -> Tensor:
        """Return what these rows of batch `number` add to its loss."""
        draws = self._draws(number, self._plan, self._train, 0, rows)
        if self._class_plan is not None:
            draws += self._draws(number, self._class_plan, self._class_items, 1, rows)
        found = [self._losses(group) for group in self._by_size(draws)]
        return torch.cat(found) if found else torch.zeros(0)

    def _by_size(self, draws: Sequence[_Draw]) -> Iterator[list[_Draw]]:
        groups: dict[Size, list[_Draw]] = {}
        for draw in draws:
            groups.setdefault(self._size_of[draw.item.digest], []).append(draw)
        yield from groups.values()

    def _draws(
        self, number: int, plan: Plan, items: Sequence[Item], kind: int, rows: slice
    ) -> list[_Draw]:
        options = self.options
        indices = plan.batch(number)
        rng = np.random.default_rng([options.seed, number, kind])
        # One timestep of each of B equal parts of them: the loss of a batch varies much less.
        parts = (rng.permutation(len(indices)) + rng.random(len(indices))) / len(indices)
        last = self.schedule.config.num_train_timesteps - 1
        timesteps = np.minimum(parts * (last + 1), last).astype(int).tolist()
        draws = []
        for row, index in enumerate(indices):
            seed = (options.seed, number, kind, row)
            own = np.random.default_rng([*seed, 7])
            draws.append(
                _Draw(
                    items[index],
                    self._caption(items[index], own, is_class=kind == 1),
                    options.random_flip and own.random() < 0.5,
                    seed,
                    timesteps[row],
                    options.prior_loss_weight if kind == 1 else 1.0,
                )
            )
        return draws[rows]

    def _caption(self, item: Item, rng: np.random.Generator, *, is_class: bool) -> str:
        options = self.options
        if is_class:
            return options.class_prompt or ""
        if options.caption_dropout and rng.random() < options.caption_dropout:
            return ""
        if options.method == "dreambooth":
            return options.instance_prompt or ""
        if self._is_word:
            templates = _TEMPLATES[options.learnable_property]
            word = options.placeholder_token or ""
            return templates[rng.integers(len(templates))].format(word)
        caption = item.captions[rng.integers(len(item.captions))]
        if options.shuffle_caption:
            parts = [part.strip() for part in caption.split(",")]
            kept, others = parts[: options.keep_tokens], parts[options.keep_tokens :]
            caption = ", ".join([*kept, *(others[i] for i in rng.permutation(len(others)))])
        return caption

    def _losses(self, draws: Sequence[_Draw], *, weighted: bool = True) -> Tensor:
        """Return the squared error of each row, whose pictures are of one size."""
        options, schedule = self.options, self.schedule
        shown = [self._cache.latents(draw, self._size_of[draw.item.digest]) for draw in draws]
        latents = torch.stack([each.latents for each in shown]).to(self.device)
        noise = torch.stack([self._noise(draw, latents.shape[1:]) for draw in draws])
        noise = noise.to(self.device)
        timesteps = [draw.timestep for draw in draws]
        sigmas = [float(schedule.sigmas[timestep]) for timestep in timesteps]
        sigma = torch.tensor(sigmas, device=self.device)[:, None, None, None]
        told = self._told(draws, shown)
        found = self._unet(
            (latents + noise * sigma) / (sigma**2 + 1) ** 0.5,
            torch.tensor(timesteps, device=self.device, dtype=torch.float32),
            **told,
        )
        kind = schedule.config.prediction_type
        target = training_target(kind, latents, noise, sigma)
        errors: Tensor = (found.float() - target).square().mean((1, 2, 3))
        if not weighted:
            return errors
        weights = [
            draw.weight * training_weight(kind, level, options.snr_gamma)
            for draw, level in zip(draws, sigmas, strict=True)
        ]
        return errors * torch.tensor(weights, device=self.device)

    def _noise(self, draw: _Draw, shape: Sequence[int]) -> Tensor:
        rng = np.random.default_rng([*draw.seed, 11])
        noise = torch.from_numpy(rng.standard_normal(tuple(shape), np.float32))
        if self.options.noise_offset:
            shift = rng.standard_normal((shape[0], 1, 1), np.float32)
            noise = noise + self.options.noise_offset * torch.from_numpy(shift)
        return noise

    def _told(self, draws: Sequence[_Draw], shown: Sequence[_Shown]) -> dict[str, Tensor]:
        """Return what the UNet is told of each row."""
        if self._trains_text or self.options.shuffle_caption:
            words, pooled = self.encode_text([draw.caption for draw in draws])
        else:
            each = [self._cache.words(draw.caption) for draw in draws]
            words = torch.stack([one["words"] for one in each]).to(self.device)
            pooled = torch.stack([one["pooled"] for one in each]).to(self.device)
        dtype = next(self._unet.parameters()).dtype
        told = {"encoder_hidden_states": words.to(dtype)}
        if "text_embeds" in self._unet.config.inputs:
            sizes = [[*one.original, *one.corner, *one.size] for one in shown]
            told["text_embeds"] = pooled.to(dtype)
            told["time_ids"] = torch.tensor(sizes, device=self.device, dtype=torch.float32)
        return told

    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return `encoder_hidden_states` [B, T, D] and the pooled vector [B, E] of captions."""
        states, pooled = [], torch.zeros(0)
        for name, encoder in self._texts.items():
            tokenizer = self._tokenizers[name.replace("text_encoder", "tokenizer")]
            ids = torch.tensor([tokenizer.encode(each) for each in captions], device=self.device)
            found, pooled = encoder(ids)
            states.append(found)
        return torch.cat(states, -1), pooled

    def _encode_ahead(self) -> None:
        """Encode pictures and words before the first step; each process its part."""
        options = self.options
        ahead = [*self._train, *self._class_items, *self._held]
        if options.cache_latents:
            mine = ahead[self.workers.rank :: self.workers.count]
            for item in mine:
                for is_flipped in (False, True) if options.random_flip else (False,):
                    draw = _Draw(item, "", is_flipped, (), 0)
                    self._cache.latents(draw, self._size_of[item.digest])
        self.workers.wait()
        if options.cache_latents and self.device.type == "cuda":
            self._vae.to("cpu")

    # --- validation and samples ---------------------------------------------------------------

    def validate(self) -> Validation | None:
        """Return the mean squared error on held-out pictures, each at one timestep of each band."""
        if not self._held:
            return None
        total = self.schedule.config.num_train_timesteps
        sums = torch.zeros(2, _BANDS)
        for item in self._held[self.workers.rank :: self.workers.count]:
            draws = []
            for band in range(_BANDS):
                seed = (int(item.digest[:15], 16), band)
                share = (band + np.random.default_rng(seed).random()) / _BANDS
                caption = self._caption_of_held(item)
                draws.append(_Draw(item, caption, False, seed, int(share * total)))
            sums[0] += self._losses(draws, weighted=False).float().cpu()
            sums[1] += 1
        self.workers.add_up([sums])
        means = (sums[0] / sums[1]).tolist()
        edges = [band * total // _BANDS for band in range(_BANDS + 1)]
        parts = {f"t{edges[b]}-{edges[b + 1]}": means[b] for b in range(_BANDS)}
        mean = sum(means) / _BANDS
        return Validation(mean, parts, merit=-mean)

    def _caption_of_held(self, item: Item) -> str:
        if self.options.method == "dreambooth":
            return self.options.instance_prompt or ""
        if self._is_word:
            word = self.options.placeholder_token or ""
            return _TEMPLATES[self.options.learnable_property][0].format(word)
        return item.captions[0]

    def sample(self, step: int) -> None:
        """Draw the sample prompts with seeds 0, 1, 2 … into `samples/`."""
        prompts = self._prompts()
        if not prompts:
            return
        folder = self.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        generator = self._painter()
        for number, prompt in enumerate(prompts):
            drawn = self._drawn(generator, prompt, number)
            drawn.save(folder / f"step-{step:08d}-{number}.png")
        if self.options.cache_latents and self.device.type == "cuda":
            self._vae.to("cpu")

    def _prompts(self) -> list[str]:
        options = self.options
        if options.sample_prompts:
            return list(options.sample_prompts)
        count = options.num_sample_images
        if options.method == "dreambooth":
            return [options.instance_prompt or ""] * count
        if self._is_word:
            word = options.placeholder_token or ""
            return [t.format(word) for t in _TEMPLATES[options.learnable_property]][:count]
        shown = self._held or self._train
        return [" ".join(each.captions[0].split()) for each in shown[:count]]

    def _painter(self) -> ImageGenerator:
        self._vae.to(self.device)
        networks = generator_networks(self.modules)
        return ImageGenerator(networks, self._tokenizers, self.model)

    def _drawn(self, generator: ImageGenerator, prompt: str, seed: int) -> GeneratedImage:
        side = self.options.resolution
        return generator.generate(prompt, seed=seed, width=side, height=side)

    # --- the end ------------------------------------------------------------------------------

    def finish(self) -> list[Path]:
        """Write the LoRA, the word or the whole model."""
        options, folder = self.options, self.folder
        if self._updates:
            files = [folder / "pytorch_lora_weights.safetensors"]
            save_lora(self._updates, files[0])
            if options.save_kohya:
                files.append(folder / "kohya_lora.safetensors")
                save_lora(self._updates, files[1], layout="kohya")
            return files
        if self._words:
            path = folder / "learned_embeds.safetensors"
            vectors = {name: words.vectors for name, words in self._words.items()}
            save_embedding(vectors, options.placeholder_token or "", path)
            return [path]
        self._vae.to(self.device)
        files = [folder / "model"]
        save_generator(self.modules, self.model, files[0], dtype="float32")
        if options.save_single_file:
            files.append(folder / "model.safetensors")
            save_generator(self.modules, self.model, files[1], layout="ldm", dtype="float32")
        return files


def _check(model: GeneratorFolder, vae: Vae) -> None:
    unet = model.configs["unet"]
    if unet["in_channels"] != vae.config.latent_channels:
        raise UnsupportedModel(
            f"{model.name} takes {unet['in_channels']} channels of latents, as networks for "
            "inpainting do: fine-tune an ordinary generator"
        )
    if unet["time_cond_proj_dim"] is not None:
        raise UnsupportedModel(
            f"{model.name} is distilled to a few steps (LCM): fine-tune the model it came from"
        )


def _side_step(unet: UNet, vae: Vae) -> int:
    """Return what the sides of a picture have to be multiples of."""
    halvings = len(unet.config.block_out_channels) + len(vae.config.block_out_channels) - 2
    return int(vae.config.patch_size) << halvings


# --- cached -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shown:
    """Hold a picture's latents [C, h, w], and the heights and widths that SDXL is told."""

    latents: Tensor
    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


class _Cache:
    """Encode pictures and words, and keep what was encoded."""

    def __init__(self, task: GeneratorTask, folder: Path) -> None:
        self._task = task
        options, model = task.options, task.model
        self._pictures = TensorCache(folder / "latents" if options.cache_latents else None)
        self._words = TensorCache(folder / "words")
        weights = _identity(model)
        self._of_vae = {"weights": weights, "config": model.configs["vae"]}
        self._of_text = {
            "weights": weights,
            "configs": [c for n, c in model.configs.items() if n.startswith("text_encoder")],
            "precision": options.mixed_precision,
        }

    def latents(self, draw: _Draw, size: Size) -> _Shown:
        """Return scaled latents, drawn from what the autoencoder says of the picture."""
        task, options, item = self._task, self._task.options, draw.item
        if options.center_crop:
            corner = _middle((item.width, item.height), size)
        else:
            corner = _anywhere((item.width, item.height), size, draw.seed)

        def encode() -> dict[str, Tensor]:
            image = _covering(item.open(), size, corner)
            if draw.is_flipped:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(to_pixel_values(image))[None].to(task.device)
            with torch.no_grad(), torch.autocast(task.device.type, enabled=False):
                mean, log_variance = task._vae.to(task.device).float().encode(pixels)
            return {"mean": mean[0], "std": (0.5 * log_variance[0]).exp()}

        if options.cache_latents:
            key = cache_key(
                picture=item.digest, size=size, corner=corner, flip=draw.is_flipped, **self._of_vae
            )
            kept = self._pictures.get(key, encode)
        else:
            kept = {name: each.cpu() for name, each in encode().items()}
        drawn = kept["mean"]
        if draw.seed:
            rng = np.random.default_rng([*draw.seed, 13])
            noise = rng.standard_normal(tuple(drawn.shape), np.float32)
            drawn = drawn + kept["std"] * torch.from_numpy(noise)
        config = task._vae.config
        scaled = (drawn - config.shift_factor) * config.scaling_factor
        return _Shown(
            scaled,
            original=(item.height, item.width),
            corner=(corner[1], corner[0]),
            size=(size[1], size[0]),
        )

    def words(self, caption: str) -> dict[str, Tensor]:
        """Return the vectors of a caption, which no step changes."""
        task = self._task

        def encode() -> dict[str, Tensor]:
            with torch.no_grad():
                words, pooled = task.encode_text([caption])
            return {"words": words[0], "pooled": pooled[0]}

        return self._words.get(cache_key(caption=caption, **self._of_text), encode)


def _identity(model: GeneratorFolder) -> list[list[Any]]:
    """Tell these weights from others: by the sizes and times of their files."""
    files = sorted({path for paths in model.weights.values() for path in paths})
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _scaled(picture: Size, size: Size) -> Size:
    """Return the size of a picture that just covers `size`."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    return max(size[0], round(picture[0] * scale)), max(size[1], round(picture[1] * scale))


def _middle(picture: Size, size: Size) -> tuple[int, int]:
    inner = _scaled(picture, size)
    return (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2


def _anywhere(picture: Size, size: Size, seed: tuple[int, ...]) -> tuple[int, int]:
    inner = _scaled(picture, size)
    rng = np.random.default_rng([*seed, 17])
    return (
        int(rng.integers(inner[0] - size[0] + 1)),
        int(rng.integers(inner[1] - size[1] + 1)),
    )


def _covering(image: Image.Image, size: Size, corner: tuple[int, int]) -> Image.Image:
    """Return `size` pixels of the picture, scaled to just cover them, from `corner` on."""
    inner = _scaled(image.size, size)
    if image.size != inner:
        image = image.resize(inner, Image.Resampling.LANCZOS)
    left, top = corner
    return image.crop((left, top, left + size[0], top + size[1]))
