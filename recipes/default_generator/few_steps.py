"""Stage 6: teach a LoRA to take several steps of the sampler in one, without guidance.

    python recipes/default_generator/few_steps.py [config.toml] [folder]
    torchrun --nproc-per-node 2 recipes/default_generator/few_steps.py     # one process a core

The way from noise to picture is cut into as many pieces as steps are wanted. The teacher walks
them in small steps with guidance; the pupil learns to arrive where the teacher did, in one step of
DDIM a piece (progressive distillation: Salimans and Ho 2022; of guidance: Meng et al. 2023). Only
sentences are needed, no pictures. Resumable; all chance follows from the seed and the step. The
folder is one that `ship.py` wrote: its generator is the teacher, and gets the edition `turbo`.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import configs
from diptych.evaluation.scenes import paraphrase, sample_scene, sentence
from diptych.models.lora import LowRank
from diptych.runtimes.export_generator import add_edition
from diptych.text import ClipTokenizer
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.samplers import sample
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.training.lora import choose_layers, new_update
from diptych.training.parallel import Workers
from diptych.training.state import (
    Average,
    Log,
    Pace,
    learning_rate,
    load_state,
    read_average,
    save_state,
)
from diptych.weights.diffusion import describe_generator
from diptych.weights.load_generator import load_generator
from diptych.weights.save_adapters import save_lora
from growth import former_names
from pictures import captions
from ship import EMBEDDED

SAVE_EVERY_S = 240.0
LOG_EVERY = 50


class Merged(nn.Module):
    """Add a low-rank update to a weight, as a parametrization of it.

    Added to the weight, once a step, it costs nothing a row.
    """

    def __init__(self, update: LowRank) -> None:
        super().__init__()
        self.update = update

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update.delta()


class Updates(nn.Module):
    """Hold the updates of a UNet's layers, by their place among `paths`."""

    def __init__(self, unet: nn.Module, words: str, rank: int, seed: int) -> None:
        super().__init__()
        self.paths, self.each = [], nn.ModuleList()
        generator = torch.Generator().manual_seed(seed)
        for _, path, layer in choose_layers({"unet": unet}, words):
            update = new_update(layer, rank, None, generator)
            parametrize.register_parametrization(layer, "weight", Merged(update))
            self.paths.append(path)
            self.each.append(update)


def main(config: dict[str, Any], folder: Path) -> None:
    settings, output = config["few_steps"], Path(config["output"])
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = describe_generator(folder)
    networks = load_generator(model, device=device, dtype="float32")
    unet = networks["unet"].to(memory_format=torch.channels_last).requires_grad_(False)
    schedule = NoiseSchedule(ScheduleConfig(**model.schedule))
    workers = Workers()
    walks = walk_all(config, networks, model.tokenizers["tokenizer"].open(), schedule, workers)

    updates = Updates(unet, settings["layers"], settings["rank"], config["seed"]).to(device)
    average = Average(updates, settings["ema_decay"])
    optimizer = torch.optim.AdamW(updates.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    state, log, first, spent = output / "few.safetensors", Log(output / "few.jsonl"), 0, 0.0
    if state.exists():
        progress = load_state(state, updates, average, optimizer)
        first, spent = progress["step"], progress["spent"]
    elif begin(updates, settings):
        average = Average(updates, settings["ema_decay"])
    pace = Pace(settings["steps"], settings.get("seconds"), spent)
    levels = schedule.steps("ddim", settings["pieces"])
    # DDIM leaves a trace of noise in the picture; the teacher does not.
    sigmas = torch.tensor([*levels.sigmas[:-1], 0.0], device=device)
    timesteps = torch.tensor(levels.timesteps, device=device).float()
    weights = weights_of(sigmas)
    rows = slice(workers.rank, None, workers.count)  # of all pieces, which lie one after another
    step, saved, told = first, time.time(), []
    while step < (total := pace.total(step)):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * learning_rate(step, total, 50)
        start, end, ids, piece = (
            part[rows].to(device) for part in batch(walks, settings, (config["seed"], 7, step))
        )
        with torch.no_grad():
            words, _ = networks["text_encoder"](ids)
        with torch.autocast(device.type, torch.bfloat16):
            start = start.contiguous(memory_format=torch.channels_last)
            found = unet(start, timesteps[piece], words)
        wanted = velocity(start, end, sigmas, piece)
        loss = (found.float() - wanted).square().mean((1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        (loss * weights[piece]).mean().backward()
        workers.average(updates.parameters())
        torch.nn.utils.clip_grad_norm_(updates.parameters(), 1.0)
        optimizer.step()
        average.update(updates)
        told.append(loss.detach().view(settings["pieces"], -1).mean(1))
        step += 1
        if workers.leads and step % LOG_EVERY == 0:
            pieces = [round(mean, 5) for mean in torch.stack(told).mean(0).tolist()]
            log.write(step=step, loss=round(sum(pieces) / len(pieces), 5), pieces=pieces)
            told = []
        if workers.leads and time.time() - saved > SAVE_EVERY_S:
            save_state(state, updates, average, optimizer, {"step": step, "spent": pace.spent})
            saved = time.time()
    if workers.leads:
        save_state(state, updates, average, optimizer, {"step": step, "spent": pace.spent})
        write(updates, read_average(state), output / "turbo.safetensors")
        plain = load_generator(model, dtype="float32")["unet"]
        add_edition(plain, folder, "turbo", output / "turbo.safetensors", settings["defaults"])
    workers.close()


def begin(updates: Updates, settings: dict[str, Any]) -> bool:
    """Load the LoRA file that `start` names; tell whether it names one.

    It may be that of a shallower UNet: layers that this one did not have begin without an update.
    """
    start = settings.get("start")
    if start:
        former = {name.removeprefix("unet."): each for name, each in load_file(start).items()}
        own = [f"{path}.lora_{half}.weight" for path in updates.paths for half in "AB"]
        names = former_names(own, former)
        for path, update in zip(updates.paths, updates.each, strict=True):
            places = [f"{path}.lora_{half}.weight" for half in "AB"]
            if all(place in names for place in places):
                down, up = (former[names[place]] for place in places)
                update.load_state_dict({"down": down, "up": up})
    return bool(start)


def batch(
    walks: dict[str, Tensor], settings: dict[str, Any], seed: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw pieces of walks, equally many of each: both ends, token ids, and which piece it is."""
    size, pieces = settings["batch_size"], settings["pieces"]
    rows = np.random.default_rng(seed).integers(len(walks["ids"]), size=size)
    chosen, piece = torch.from_numpy(rows), torch.arange(pieces).repeat_interleave(size // pieces)
    start, end = (walks["latents"][chosen, piece + k].float() for k in (0, 1))
    return start, end, walks["ids"][chosen], piece


def velocity(start: Tensor, end: Tensor, sigmas: Tensor, piece: Tensor) -> Tensor:
    """Return the v [B, c, h, w] with which a step of DDIM from `start` arrives at `end`.

    Both are latents of variance one, `piece` [B] the places of their levels in `sigmas`.
    """
    sigma, target = (sigmas[piece + k].float()[:, None, None, None] for k in (0, 1))
    signal, left = (1 + sigma.square()).rsqrt(), (1 + target.square()).rsqrt()
    ratio = target / sigma
    clean = (end / left - start / signal * ratio) / (1 - ratio)
    return (signal * start - clean) / (sigma * signal)


def weights_of(sigmas: Tensor) -> Tensor:
    """Return what an error of each piece's v weighs; 1 on average.

    It is how far the error moves the latents at the end of the piece. The first piece, which hardly
    moves them, is the hardest and would outweigh all others.
    """
    sigma, target = sigmas[:-1].float(), sigmas[1:].float()
    moved = (1 - target / sigma) * sigma * (1 + sigma.square()).rsqrt()
    moved *= (1 + target.square()).rsqrt()
    return moved / moved.mean()


# --- the teacher's walks --------------------------------------------------------------------------


def walk_all(
    config: dict[str, Any],
    networks: dict[str, nn.Module],
    tokenizer: ClipTokenizer,
    schedule: NoiseSchedule,
    workers: Workers,
) -> dict[str, Tensor]:
    """Return `latents` [N, pieces + 1, c, h, w] at the ends of all pieces, and token `ids` [N, T].

    They are written part by part, each by one of the `workers`, and what is there is not walked
    again.
    """
    settings, folder = config["few_steps"], Path(config["output"]) / "walks"
    folder.mkdir(exist_ok=True)
    others = captions(Path(config["data"]))
    count = settings["walks"] // settings["walks_batch_size"]
    paths = [folder / f"{part:05}.safetensors" for part in range(count)]
    for part, path in enumerate(paths):
        if part % workers.count == workers.rank and not path.exists():
            rng = np.random.default_rng((config["seed"], 5, part))
            sentences = [
                sentence_of(settings["mix"], others, rng)
                for _ in range(settings["walks_batch_size"])
            ]
            ids = torch.tensor([tokenizer.encode(each) for each in sentences])
            empty = torch.tensor(tokenizer.encode(""))
            latents = walk(networks, ids, empty, schedule, settings, rng)
            save_file({"latents": latents, "ids": ids}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    workers.wait()
    parts = [load_file(path) for path in paths]
    return {name: torch.cat([each[name] for each in parts]) for name in ("latents", "ids")}


def sentence_of(
    mix: dict[str, float], others: dict[str, list[list[str]]], rng: np.random.Generator
) -> str:
    """Draw a sentence of a scene that is not held out, or of a training picture."""
    domain = rng.choice([*mix], p=[*mix.values()])
    if domain == "scenes":
        scene = sample_scene(rng)
        return sentence(scene) if rng.random() < 0.25 else paraphrase(scene, rng)
    several = others[domain][rng.integers(len(others[domain]))]
    return several[rng.integers(len(several))]


@torch.no_grad()
def walk(
    networks: dict[str, nn.Module],
    ids: Tensor,
    empty: Tensor,
    schedule: NoiseSchedule,
    settings: dict[str, Any],
    rng: np.random.Generator,
) -> Tensor:
    """Walk from noise to pictures with guidance; return latents [B, pieces + 1, c, h, w], halves.

    Latents are of variance one, as the network sees them.
    """
    unet, device = networks["unet"], next(networks["unet"].parameters()).device
    words, _ = networks["text_encoder"](torch.cat([ids, empty.expand_as(ids)]).to(device))
    each = settings["teacher_steps"] // settings["pieces"]
    steps = schedule.steps(settings["teacher_sampler"], settings["teacher_steps"])

    def denoise(latents: Tensor, sigma: float) -> Tensor:
        signal = 1 / math.hypot(sigma, 1)
        seen = (latents * signal).repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        told = torch.full((len(seen),), steps.timestep(sigma), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            guided, free = unet(seen, told, words).float().chunk(2)
        speed = free + settings["guidance_scale"] * (guided - free)
        return signal * (signal * latents - sigma * speed)

    size = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.from_numpy(rng.standard_normal((len(ids), *size), np.float32))
    start = noise.to(device)
    kept = [start]
    kept += [
        step.latents / math.hypot(steps.sigmas[step.index + 1], 1)
        for step in sample(steps, denoise, start * steps.initial_scale, NoiseSource([0]))
        if (step.index + 1) % each == 0
    ]
    return torch.stack(kept, 1).half().cpu()


# --- the file -------------------------------------------------------------------------------------


def write(updates: Updates, tensors: dict[str, Tensor], path: Path) -> None:
    """Write the averaged updates as a LoRA in the layout of PEFT."""
    save_lora(
        {
            ("unet", name): LowRank(tensors[f"each.{index}.down"], tensors[f"each.{index}.up"])
            for index, name in enumerate(updates.paths)
        },
        path,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main(configs.asked(), Path(sys.argv[2]) if len(sys.argv) > 2 else EMBEDDED)
