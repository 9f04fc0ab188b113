"""Stage 5: the decoder learns to forgive latents that are painted, not encoded.

    python recipes/default_generator/polish.py [config.toml]

A painter's latents are a little off, and the decoder of stage 1 answers with a mesh of its patches.
Here the encoder stays, latents get noise of a random strength, and the decoder also has to hit the
differences between neighbouring pixels. Goes on from the last saved state; all chance follows from
the seed and the step. Stage 1 keeps its own file: it could not go on from this one.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.models.vae import Vae
from diptych.training.state import (
    Average,
    Log,
    Pace,
    decayed,
    learning_rate,
    load_state,
    save_state,
)
from train_vae import Pictures, read, to_pixels, trained, validate

STATE = "polished"
LOG_EVERY = 50


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("config.toml")
    config = tomllib.loads(path.read_text())
    settings, output = config["polish"], Path(config["output"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config["seed"])
    module = trained(config, device).requires_grad_(False).train()
    for part in (module.decoder, module.post_quant_conv):
        if part is not None:
            part.requires_grad_(True)
    average = Average(module, settings["ema_decay"])
    named = [each for each in module.named_parameters() if each[1].requires_grad]
    optimizer = torch.optim.AdamW(decayed(named, 1e-4), lr=0.0, betas=(0.9, 0.99))
    state, log = output / f"{STATE}.safetensors", Log(output / "polish.jsonl")
    step, spent = 0, 0.0
    if state.exists():
        progress = load_state(state, module, average, optimizer)
        step, spent = progress["step"], progress["spent"]
    pictures, latents, spread = encoded(module, read(config), device)
    pace = Pace(settings["steps"], settings.get("seconds"), spent)
    sums: dict[str, Tensor] = {}
    while step < (total := pace.total(step)):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * learning_rate(step, total, 50)
        rng = np.random.default_rng((config["seed"], 5, step))
        found = loss(module, *batch(pictures, latents, spread, settings, rng, device), settings)
        optimizer.zero_grad(set_to_none=True)
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module)
        sums = {name: sums.get(name, 0) + value.detach() for name, value in found.items()}
        step += 1
        if step % LOG_EVERY == 0:
            log.write(step=step, **{n: round(float(v) / LOG_EVERY, 5) for n, v in sums.items()})
            sums = {}
            save_state(state, module, average, optimizer, {"step": step, "spent": pace.spent})
    save_state(state, module, average, optimizer, {"step": step, "spent": pace.spent})
    log.write(step=step, **validate(config, device, STATE))


@torch.no_grad()
def encoded(
    module: Vae, data: dict[str, Pictures], device: torch.device
) -> tuple[dict[str, Pictures], dict[str, Tensor], Tensor]:
    """Return the pictures, the means of their latents, and the deviation of each channel."""
    latents = {
        name: torch.cat(
            [
                module.encode(to_pixels(each[start : start + 100], device))[0]
                for start in range(0, len(each), 100)
            ]
        )
        for name, each in data.items()
    }
    spread = torch.cat([each[:2000] for each in latents.values()]).std((0, 2, 3), keepdim=True)
    return data, latents, spread


def batch(
    pictures: dict[str, Pictures],
    latents: dict[str, Tensor],
    spread: Tensor,
    settings: dict[str, Any],
    rng: np.random.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return noisy latents [B, c, s, s] of random places, and the pixels there [B, 3, 8s, 8s]."""
    side, names = settings["side"], list(settings["mix"])
    chosen = rng.choice(names, settings["batch_size"], p=list(settings["mix"].values()))
    found, wanted = [], []
    for name in chosen:
        index = rng.integers(len(pictures[name]))
        whole = latents[name].shape[-1]
        top, left = rng.integers(0, whole - side + 1, 2)
        found.append(latents[name][index, :, top : top + side, left : left + side])
        y, x = 8 * top, 8 * left
        wanted.append(pictures[name][index, y : y + 8 * side, x : x + 8 * side])
    clean = torch.stack(found)
    chance = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(clean.shape, generator=chance, device=device)
    strength = torch.rand(len(clean), 1, 1, 1, generator=chance, device=device)
    noisy = clean + noise * spread * strength.square() * settings["noise"]
    return noisy, to_pixels(np.stack(wanted), device)


def loss(
    module: Vae, latents: Tensor, pixels: Tensor, settings: dict[str, Any]
) -> dict[str, Tensor]:
    difference = module.decode(latents) - pixels
    squared = difference.square().mean()
    edges = difference.diff(dim=2).square().mean() + difference.diff(dim=3).square().mean()
    return {"loss": squared + settings["edge_weight"] * edges, "squared": squared, "edges": edges}


if __name__ == "__main__":
    main()
