"""How fast does a LoRA learn, beside peft and diffusers, on the same random weights?

    python benchmarks/train_speed.py [--models small full] [--size 512] [--steps 3]
        [--batch 1] [--device cpu] [--dtype float32] [--keep FOLDER] [--record]

All sides train a LoRA of rank 8 on the attention layers with AdamW, on the same pictures. They
take turns step by step in one process, so that a busy machine slows all; peak memory is that of a
process that trains one side alone.

- ours reads latents and words from its cache on disk
- script does what diffusers' train_text_to_image_lora.py does: it encodes them anew at every step
- peft is the same with latents and words encoded beforehand and kept in memory

- small: a random pipeline of a few hundred thousand weights, 128 pixels
- full: Stable Diffusion 1.5 in full size, random weights
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import machine, python, record, take_turns, whole_process

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIDES = ("ours", "script", "peft")
RANK, RATE = 8, 1e-4


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _parse(arguments)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        if options.alone is not None:  # a fresh process, for its memory
            side, model, data = options.alone
            step = SIDE[side](Path(model), Path(data), options, Path(temporary))
            for number in range(options.steps):
                step(number)
            print(json.dumps({"peak_gpu_mb": _gpu_peak(options.device)}))
            return []
        for name in options.models:
            model = _model(name, options.keep or Path(temporary))
            data = _data(Path(temporary) / "data", options.size if name == "full" else 128)
            result = _measure(name, model, data, options, Path(temporary))
            results.append(result)
            print(json.dumps(result), flush=True)
    print(machine())
    if options.record:
        print(record(results, "train_speed"))
    return results


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=("small", "full"), default=["small", "full"])
    parser.add_argument("--size", type=int, default=512, help="pixels of an edge, full size")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--keep", type=Path, help="keep the model files there for the next time")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _model(name: str, folder: Path) -> Path:
    from generate_speed import make_model

    path = folder / name
    make_model(path, quick=name == "small")
    return path


def _data(folder: Path, size: int) -> Path:
    from training_pictures import draw_pictures

    return draw_pictures(folder / str(size), 8, seed=1, size=(size, size))


def _measure(
    name: str, model: Path, data: Path, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    steps = {side: SIDE[side](model, data, options, folder / name / side) for side in SIDES}
    counts = dict.fromkeys(SIDES, 0)

    def turn(side: str) -> Callable[[], None]:
        def run() -> None:
            steps[side](counts[side])
            counts[side] += 1
            _wait(options.device)

        return run

    times = take_turns({side: turn(side) for side in SIDES}, repeats=options.steps)
    result: dict[str, Any] = {
        "model": name,
        "size": options.size if name == "full" else 128,
        "batch": options.batch,
        "dtype": options.dtype,
        "device": options.device,
        **{
            ("" if side == "peft" else f"{side}_") + "speed_ratio": times[side]["median_s"]
            / times["ours"]["median_s"]
            for side in SIDES[1:]
        },
    }
    steps.clear()
    for side in SIDES:
        words = [
            *(__file__, "--alone", side, str(model), str(data), "--steps", "1"),
            *("--batch", str(options.batch), "--size", str(options.size)),
            *("--device", options.device, "--dtype", options.dtype),
        ]
        process = whole_process(python(*words), repeats=1)
        result[side] = {
            "steps_per_s": 1 / times[side]["median_s"],
            **times[side],
            "peak_mib": process["peak_mib"],
        }
    return result


# --- the sides ------------------------------------------------------------------------------------


def _ours(
    model: Path, data: Path, options: argparse.Namespace, folder: Path
) -> Callable[[int], None]:
    import torch

    from diptych.training.data import prepare
    from diptych.training.generator import GeneratorTask
    from diptych.training.loop import _Run
    from diptych.training.methods import generator_defaults
    from diptych.training.options import GeneratorTrainOptions
    from diptych.training.parallel import Workers
    from diptych.training.workplace import Workplace
    from diptych.weights.generator_files import describe_generator
    from diptych.weights.load_generator import load_generator

    folder.mkdir(parents=True, exist_ok=True)
    described = describe_generator(model)
    train = GeneratorTrainOptions(
        rank=RANK,
        learning_rate=RATE,
        resolution=_side(data),
        train_batch_size=options.batch,
        max_train_steps=10_000,
        mixed_precision="bf16" if options.dtype == "bfloat16" else "no",
        num_sample_images=0,
        caption_dropout=0.0,
    )
    train = train.resolve(generator_defaults(train, described))
    device = torch.device(options.device)
    task = GeneratorTask(
        described,
        load_generator(described, device=device, dtype="float32"),
        prepare(data, validation_fraction=0.0),
        train,
        Workplace(folder, device, Workers.alone()),
    )
    run = _Run(task, train, False, None)
    return lambda number: run._update()


def _peft(
    model: Path,
    data: Path,
    options: argparse.Namespace,
    folder: Path,
    *,
    cached: bool = True,
) -> Callable[[int], None]:
    """Do what diffusers' train_text_to_image_lora.py does; `cached` keeps all that is encoded."""
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from peft import LoraConfig

    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    unet, vae = pipeline.unet.requires_grad_(False), pipeline.vae.requires_grad_(False)
    text_encoder = pipeline.text_encoder.requires_grad_(False)
    pixels, tokens = _examples(data, pipeline.tokenizer)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scaling = vae.config.scaling_factor
    if cached:
        with torch.no_grad():
            spreads = [vae.encode(each).latent_dist for each in pixels]
            words = [text_encoder(each)[0] for each in tokens]
        del vae, text_encoder
    else:
        vae.to(device, dtype)
        text_encoder.to(device, dtype)
    del pipeline

    def encoded(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if cached:
            seen = torch.cat([spreads[row].sample() for row in rows]).to(device, dtype)
            return seen, torch.cat([words[row] for row in rows]).to(device, dtype)
        with torch.no_grad():
            shown = torch.cat([pixels[row] for row in rows]).to(device, dtype)
            told = text_encoder(torch.cat([tokens[row] for row in rows]).to(device))[0]
            return vae.encode(shown).latent_dist.sample(), told

    unet.to(device, dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    learning = [each for each in unet.parameters() if each.requires_grad]
    for each in learning:
        each.data = each.data.float()
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=1e-2)

    def step(number: int) -> None:
        rows = [(number * options.batch + row) % len(pixels) for row in range(options.batch)]
        seen, told = encoded(rows)
        seen = seen * scaling
        noise = torch.randn_like(seen)
        timesteps = torch.randint(0, 1000, (len(rows),), device=device)
        noisy = scheduler.add_noise(seen, noise, timesteps)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = unet(noisy, timesteps, told).sample
        loss = torch.nn.functional.mse_loss(found.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _examples(data: Path, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Return the pictures [1, 3, H, W] in -1..1 and the tokens [1, 77] of their captions."""
    import torch
    from PIL import Image

    from diptych.training.formats import read_examples

    pixels, tokens = [], []
    for example in read_examples(data)[0]:
        with Image.open(data / example.name) as image:
            plain = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
        pixels.append(torch.from_numpy(plain.transpose(2, 0, 1))[None].contiguous())
        made = tokenizer(
            example.captions[0],
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        )
        tokens.append(made.input_ids)
    return pixels, tokens


SIDE = {"ours": _ours, "script": partial(_peft, cached=False), "peft": _peft}


def _side(data: Path) -> int:
    return int(data.name)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _gpu_peak(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated() >> 20)


if __name__ == "__main__":
    main()
