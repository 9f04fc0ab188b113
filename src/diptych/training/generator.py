"""Teach a generator: its weights, a LoRA, a subject (DreamBooth) or a word (textual inversion)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from diptych.errors import BadInput, UnsupportedModel
from diptych.models.clip_text import Layer as TextLayer
from diptych.models.layers import ResnetBlock
from diptych.models.unet import UNet
from diptych.models.unet_blocks import SpatialTransformer
from diptych.models.vae import Vae
from diptych.runtimes.on_torch_generator import generator_networks
from diptych.text import ClipTokenizer
from diptych.text_to_image.denoiser import training_target, training_weight
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.generator import ImageGenerator
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.training.buckets import Plan, Size, bucket_of, bucket_sizes
from diptych.training.cache import file_mark
from diptych.training.checkpoints import write_whole
from diptych.training.data import Dataset, Item, prepare
from diptych.training.encoded import Encoder, Shown
from diptych.training.memory import HALVES, checkpoint_blocks
from diptych.training.methods import choose_learning
from diptych.training.options import GeneratorTrainOptions
from diptych.training.resting import Resting
from diptych.training.task import Validation
from diptych.training.wording import Wording
from diptych.training.workplace import Workplace
from diptych.weights.generator_files import GeneratorFolder
from diptych.weights.save_adapters import save_embedding, save_lora
from diptych.weights.save_generator import save_generator

__all__ = ["GeneratorTask"]

_BANDS = 4  # of timesteps, each measured by itself


@dataclass(frozen=True, slots=True)
class _Draw:
    """Hold what one row of a batch shows."""

    item: Item
    caption: str
    timestep: int
    seed: tuple[int, ...]
    is_flipped: bool = False
    weight: float = 1.0


class GeneratorTask:
    """Learn to paint what is shown, by the loss of the denoiser that paints."""

    def __init__(
        self,
        model: GeneratorFolder,
        modules: Mapping[str, nn.Module],
        dataset: Dataset,
        options: GeneratorTrainOptions,
        place: Workplace,
    ) -> None:
        """Prepare a run; `options` are resolved, `modules` on the device in float32."""
        self.model, self.modules, self.options, self.place = model, modules, options, place
        self._unet, self._vae = cast(UNet, modules["unet"]), cast(Vae, modules["vae"])
        _check(model, self._vae, options)
        # The order in which convolutions read kernels; numbers stay the same.
        self._unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = NoiseSchedule(ScheduleConfig(**model.schedule))
        tokenizers = {name: files.open() for name, files in model.tokenizers.items()}
        keeps_words = not (options.train_text_encoder or options.method == "textual-inversion")
        # Vectors of a caption are kept while the encoders stay, and captions come again.
        keeps_words = keeps_words and not options.shuffle_caption
        self._resting = Resting(model, self._waiting(keeps_words), place.device)
        # Drawn before anything learns.
        self._class_items = self._draw_class_images(tokenizers)
        self.learning = choose_learning(modules, tokenizers, options)
        self.groups = self.learning.groups
        self._encoder = Encoder(
            model, modules, self.learning.tokenizers, options, place, self._resting
        )
        self._words = self._encoder.kept_words if keeps_words else self._encoder.words
        self._wording = Wording(options)
        if options.gradient_checkpointing:
            for module in modules.values():
                checkpoint_blocks(module, (ResnetBlock, SpatialTransformer, TextLayer))
        self._train = dataset.train
        held = sorted(dataset.validation, key=lambda each: each.digest)
        self._held = held[: options.num_validation_images]
        sizes = self._sizes()
        self._size_of = {
            each.digest: bucket_of((each.width, each.height), sizes)
            for each in (*self._train, *self._held, *self._class_items)
        }
        self._plan = self._planned(self._train, options.seed)
        self._class_plan = (
            self._planned(self._class_items, options.seed + 1) if self._class_items else None
        )
        self.batches_per_epoch = self._plan.batches_per_epoch
        self._encode_ahead(keeps_words)

    def _waiting(self, keeps_words: bool) -> dict[str, nn.Module]:
        """Return the networks that steps do without, once all is encoded."""
        options = self.options
        writes_all = not options.is_lora and options.method != "textual-inversion"
        # Read from the checkpoint again, what is written in the end would hang on its being there.
        if writes_all and self.place.device.type == "cpu":
            return {}
        return {
            name: module
            for name, module in self.modules.items()
            if (name == "vae" and options.cache_latents)
            or (name.startswith("text_encoder") and keeps_words)
        }

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

    def _draw_class_images(self, tokenizers: Mapping[str, ClipTokenizer]) -> Sequence[Item]:
        """Let the model draw its idea of the class, or find what it drew before."""
        options = self.options
        if options.method != "dreambooth" or not options.class_prompt:
            return ()
        folder = self.place.folder / "class_images"
        folder.mkdir(parents=True, exist_ok=True)
        note, said = folder / "drawn.json", json.dumps(self._class_drawing(), indent=2)
        if self.place.workers.leads and (not note.is_file() or note.read_text("utf-8") != said):
            for path in folder.glob("*.png"):  # of another prompt, or by another model
                path.unlink()
            write_whole(note, said)
        self.place.workers.wait()
        missing = [n for n in range(options.num_class_images)
                   if not (folder / f"{n:05}.png").is_file()]  # fmt: skip
        if missing and self.place.workers.leads:
            self.place.note(
                f"drawing {len(missing)} pictures of the class {options.class_prompt!r}"
            )
            generator = self._painter(tokenizers)
            for number in missing:
                seed = (options.seed * 100_003 + number) % 2**63
                drawn = self._drawn(generator, options.class_prompt, seed)
                drawn.save(folder / f"{number:05}.png")
        self.place.workers.wait()
        found = prepare(folder, validation_fraction=0.0, needs_captions=False)
        return found.train[: options.num_class_images]

    def _class_drawing(self) -> dict[str, Any]:
        """Say what the pictures of the class follow from."""
        words = ("class_prompt", "resolution", "seed")
        files = sorted({path for paths in self.model.weights.values() for path in paths})
        marks = {path.name: file_mark(path) for path in files}
        return {**{word: getattr(self.options, word) for word in words}, "weights": marks}

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
            is_class = kind == 1
            words = options.class_prompt if is_class else self._wording.training(items[index], own)
            draws.append(
                _Draw(
                    items[index],
                    words or "",
                    timesteps[row],
                    seed,
                    is_flipped=bool(options.random_flip and own.random() < 0.5),
                    weight=options.prior_loss_weight if is_class else 1.0,
                )
            )
        return draws[rows]

    def _losses(self, draws: Sequence[_Draw], *, weighted: bool = True) -> Tensor:
        """Return the squared error of each row, whose pictures are of one size."""
        options, schedule = self.options, self.schedule
        shown = [self._shown(draw) for draw in draws]
        latents = torch.stack([each.latents for each in shown]).to(self.place.device)
        noise = torch.stack([self._noise(draw, latents.shape[1:]) for draw in draws])
        noise = noise.to(self.place.device)
        timesteps = [draw.timestep for draw in draws]
        sigmas = [float(schedule.sigmas[timestep]) for timestep in timesteps]
        sigma = torch.tensor(sigmas, device=self.place.device)[:, None, None, None]
        told = self._told(draws, shown)
        found = self._unet(
            (latents + noise * sigma) / (sigma**2 + 1) ** 0.5,
            torch.tensor(timesteps, device=self.place.device, dtype=torch.float32),
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
        return errors * torch.tensor(weights, device=self.place.device)

    def _noise(self, draw: _Draw, shape: Sequence[int]) -> Tensor:
        rng = np.random.default_rng([*draw.seed, 11])
        noise = torch.from_numpy(rng.standard_normal(tuple(shape), np.float32))
        if self.options.noise_offset:
            shift = rng.standard_normal((shape[0], 1, 1), np.float32)
            noise = noise + self.options.noise_offset * torch.from_numpy(shift)
        return noise

    def _told(self, draws: Sequence[_Draw], shown: Sequence[Shown]) -> dict[str, Tensor]:
        """Return what the UNet is told of each row."""
        words, pooled = self._words([draw.caption for draw in draws])
        dtype = next(self._unet.parameters()).dtype
        told = {"encoder_hidden_states": words.to(dtype)}
        if "text_embeds" in self._unet.config.inputs:
            sizes = [[*one.original, *one.corner, *one.size] for one in shown]
            told["text_embeds"] = pooled.to(dtype)
            told["time_ids"] = torch.tensor(sizes, device=self.place.device, dtype=torch.float32)
        return told

    def _shown(self, draw: _Draw) -> Shown:
        size = self._size_of[draw.item.digest]
        return self._encoder.latents(draw.item, size, draw.seed, is_flipped=draw.is_flipped)

    def _encode_ahead(self, keeps_words: bool) -> None:
        """Encode all pictures and captions before the first step, each process its part."""
        workers = self.place.workers
        if self.options.cache_latents:
            ahead = [*self._train, *self._class_items, *self._held]
            for item in ahead[workers.rank :: workers.count]:
                for is_flipped in (False, True) if self.options.random_flip else (False,):
                    size = self._size_of[item.digest]
                    self._encoder.latents(item, size, is_flipped=is_flipped)
        if keeps_words:
            half = HALVES.get(self.options.mixed_precision)
            # As within a step: what is kept is what a step would have computed.
            with torch.autocast(self.place.device.type, half, enabled=half is not None):
                captions = {self.options.class_prompt or ""} if self._class_items else set()
                for item in (*self._train, *self._held):
                    captions.update(self._wording.all_of(item))
                for caption in sorted(captions)[workers.rank :: workers.count]:
                    self._encoder.kept_words([caption])
        workers.wait()
        self._resting.rest()

    # --- validation and samples ---------------------------------------------------------------

    def validate(self) -> Validation | None:
        """Return the mean squared error on held-out pictures, each at one timestep of each band."""
        if not self._held:
            return None
        total = self.schedule.config.num_train_timesteps
        sums = torch.zeros(2, _BANDS)
        for item in self._held[self.place.workers.rank :: self.place.workers.count]:
            draws = []
            for band in range(_BANDS):
                seed = (int(item.digest[:15], 16), band)
                share = (band + np.random.default_rng(seed).random()) / _BANDS
                draws.append(_Draw(item, self._wording.held_out(item), int(share * total), seed))
            sums[0] += self._losses(draws, weighted=False).float().cpu()
            sums[1] += 1
        self.place.workers.add_up([sums])
        means = (sums[0] / sums[1]).tolist()
        edges = [band * total // _BANDS for band in range(_BANDS + 1)]
        parts = {f"t{edges[b]}-{edges[b + 1]}": means[b] for b in range(_BANDS)}
        mean = sum(means) / _BANDS
        return Validation(mean, parts, merit=-mean)

    def sample(self, step: int) -> None:
        """Draw the sample prompts with seeds 0, 1, 2 … into `samples/`."""
        prompts = self._wording.samples(self._held or self._train)
        if not prompts:
            return
        folder = self.place.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        generator = self._painter(self.learning.tokenizers)
        for number, prompt in enumerate(prompts):
            drawn = self._drawn(generator, prompt, number, self._wording.has_weights)
            drawn.save(folder / f"step-{step:08d}-{number}.png")
        self._resting.rest()

    def _painter(self, tokenizers: Mapping[str, ClipTokenizer]) -> ImageGenerator:
        self._resting.wake()
        return ImageGenerator(generator_networks(self.modules), tokenizers, self.model)

    def _drawn(
        self, generator: ImageGenerator, prompt: str, seed: int, parse_weights: bool = True
    ) -> GeneratedImage:
        side = self.options.resolution
        return generator.generate(
            prompt, seed=seed, width=side, height=side, parse_weights=parse_weights
        )

    # --- the end ------------------------------------------------------------------------------

    def finish(self) -> list[Path]:
        """Write the LoRA, the word or the whole model."""
        options, folder, learning = self.options, self.place.folder, self.learning
        if learning.updates:
            files = [folder / "pytorch_lora_weights.safetensors"]
            save_lora(learning.updates, files[0])
            if options.save_kohya:
                files.append(folder / "kohya_lora.safetensors")
                save_lora(learning.updates, files[1], layout="kohya")
            return files
        if learning.words:
            path = folder / "learned_embeds.safetensors"
            vectors = {name: words.vectors for name, words in learning.words.items()}
            save_embedding(vectors, options.placeholder_token or "", path)
            return [path]
        self._resting.wake()
        files = [folder / "model"]
        save_generator(self.modules, self.model, files[0], dtype="float32")
        if options.save_single_file:
            files.append(folder / "model.safetensors")
            save_generator(self.modules, self.model, files[1], layout="ldm", dtype="float32")
        return files


def _check(model: GeneratorFolder, vae: Vae, options: GeneratorTrainOptions) -> None:
    unet = model.configs["unet"]
    if options.save_single_file and (model.family == "diptych" or options.method != "full"):
        raise BadInput(
            "save_single_file is for all weights (method='full') of a Stable Diffusion model: "
            "leave it out"
        )
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
