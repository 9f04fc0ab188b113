"""Judge what stage 4 has learnt so far, on held-out scenes.

    python recipes/default_generator/judge.py [config.toml]

Appends a row to `judge.jsonl`: the mean squared error of the latents that the painter sees behind
the noise, at four timesteps, which tells runs apart that are too short to draw what was asked for;
and of drawn pictures the shares of objects with their colours, of counts, of everything.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import configs
from diptych import ImageGenerator
from diptych.evaluation.adherence import report
from diptych.evaluation.scenes import evaluation_prompts, sample_scene, sentence
from diptych.text_to_image.schedules import NoiseSchedule
from diptych.training.state import Log
from diptych.weights.save_generator import save_generator
from pictures import SIDE, Captioned
from render import render
from ship import described, networks, statistics
from tokenizer import load as load_tokenizer
from train import encode, painted, schedule_config
from train_vae import trained

PROMPTS = 100
SEED = 7  # of the prompts; another than of those of the card
SCENES = 400
TIMESTEPS = (100, 400, 700, 950)


def main() -> None:
    config = configs.asked()
    torch.backends.cudnn.benchmark = True
    row = {"error": errors(config), **adherence(config)}
    Log(Path(config["output"]) / "judge.jsonl").write(**row)


@torch.no_grad()
def errors(config: dict[str, Any]) -> dict[str, float]:
    """Return how far the painter's guess of held-out latents is from them, by timestep."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(SEED)
    drawn = [sample_scene(rng, held=True) for _ in range(SCENES)]
    pictures = np.stack([np.asarray(render(scene, rng)[0]) for scene in drawn])
    texts = [sentence(scene) for scene in drawn]
    parts = [Captioned(pictures, [[text] for text in texts])]
    latents, _ = encode(trained(config, device), parts, device)
    mean, std = statistics(config)
    latents = ((latents - mean[:, None, None]) / std[:, None, None]).to(device)
    tokenizer = load_tokenizer(config)
    ids = torch.tensor([tokenizer.encode(text) for text in texts], device=device)
    painter = painted(config).to(device)
    abar = torch.from_numpy(NoiseSchedule(schedule_config(config)).alphas_cumprod).float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    predicts_v = config["schedule"]["prediction_type"] == "v_prediction"
    found = {}
    for timestep in TIMESTEPS:
        signal, spread = abar[timestep].sqrt().item(), (1 - abar[timestep]).sqrt().item()
        wrong = []
        for rows in torch.arange(SCENES, device=device).split(100):
            noisy = signal * latents[rows] + spread * noise[rows]
            times = torch.full((len(rows),), float(timestep), device=device)
            said = painter.unet(noisy, times, painter.text_encoder(ids[rows])[0])
            if predicts_v:
                guess = signal * noisy - spread * said
            else:
                guess = (noisy - spread * said) / signal
            wrong.append((guess - latents[rows]).square().mean().item())
        found[str(timestep)] = round(float(np.mean(wrong)), 4)
    return found


def adherence(config: dict[str, Any]) -> dict[str, float]:
    """Draw validation prompts and return the shares of what is right."""
    with tempfile.TemporaryDirectory() as temporary:
        modules = networks(config)
        save_generator(modules, described(config, modules, Path(temporary)), Path(temporary))
        generator = ImageGenerator.load(temporary, runtime="torch", dtype="float32")
        prompts = evaluation_prompts(PROMPTS, SEED)
        options = {**config["defaults"], "seed": 0, "width": SIDE, "height": SIDE}
        texts = [each.prompt for each in prompts]
        drawn = list(generator.images(texts, on_error="raise", batch_size=25, **options))
    found = report(prompts, [each.image for each in drawn]).as_dict()["overall"]
    return {name: round(score["share"], 4) for name, score in found.items()}


if __name__ == "__main__":
    main()
