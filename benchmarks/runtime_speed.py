"""Which runtime is faster on the same ONNX files, ONNX Runtime or OpenVINO?

    python benchmarks/runtime_speed.py [--parts captioner generator unet start]
        [--captioner FOLDER] [--generator FOLDER] [--repeats 9] [--record]

Both take turns of five calls in one process, on the default models or on the artifacts that are
named. One part a question:

- captioner: the encoder, one step of the decoder with four beams, a caption by greedy search and
  one by four beams
- generator: a step (the UNet on two rows), the decoder of the VAE, a picture by default settings
- unet: a random UNet of 57 M parameters on 32 x 32 latents, two rows
- start: fresh processes that load the default model and make one caption or picture; their peaks
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness import machine, python, record, take_turns, whole_process

PARTS = ("captioner", "generator", "unet", "start")
RUNTIMES = ("onnxruntime", "openvino")
PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "coffee.jpg"
PROMPT = "a red circle left of a blue square"
Case = Callable[[], Any]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--captioner", default="default")
    parser.add_argument("--generator", default="default")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args(arguments)
    results = []
    for part in options.parts:
        for result in MEASURES[part](options):
            results.append({"part": part, **result})
            print(results[-1], flush=True)
    print(machine())
    if options.record:
        print(record(results, "runtime_speed"))
    return results


def captioner(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from diptych import Captioner

    tasks: dict[str, dict[str, Case]] = {}
    for runtime in RUNTIMES:
        loaded = Captioner.load(options.captioner, runtime=runtime)
        networks = loaded.networks
        size = loaded.model.config["encoder"]["image_size"]
        (bridged,) = networks["encoder"](pixel_values=np.zeros((1, 3, size, size), np.float32))
        step = _decoder_step(networks["decoder"], bridged)
        cases = {
            "encoder": lambda n=networks, s=size: n["encoder"](
                pixel_values=np.zeros((1, 3, s, s), np.float32)
            ),
            "decoder, 4 rows": step,
            "caption, greedy": lambda c=loaded: c.caption(PHOTO, num_beams=1),
            "caption, 4 beams": lambda c=loaded: c.caption(PHOTO, num_beams=4),
        }
        for task, case in cases.items():
            tasks.setdefault(task, {})[runtime] = case
    yield from _side_by_side(tasks, options.repeats)


def _decoder_step(decoder: Any, bridged: Any) -> Case:
    """Return a step with the cache of a picture and ten words, for four beams."""
    prefix = "prefix_embeds" in decoder.inputs
    words = np.ones((4, 10), np.int64)
    given = (
        {"prefix_embeds": bridged.repeat(4, axis=0)} if prefix else {"cross_key_values": bridged}
    )
    past = decoder(("present_key_values",), input_ids=words, **given)[0]
    again = {} if prefix else given
    return lambda: decoder(input_ids=words[:, :1], past_key_values=past, **again)


def generator(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from diptych import ImageGenerator

    tasks: dict[str, dict[str, Case]] = {}
    for runtime in RUNTIMES:
        loaded = ImageGenerator.load(options.generator, runtime=runtime)
        networks, configs = loaded.networks, loaded.model.configs
        edge = configs["unet"]["sample_size"]
        latents = np.zeros((1, configs["vae"]["latent_channels"], edge, edge), np.float32)
        cases = {
            "step": _unet_step(networks["unet"], configs["unet"]),
            "vae decoder": lambda n=networks, z=latents: n["vae_decoder"](latents=z),
            "picture": lambda g=loaded: g.generate(PROMPT, seed=1),
        }
        for task, case in cases.items():
            tasks.setdefault(task, {})[runtime] = case
    yield from _side_by_side(tasks, options.repeats)


def _unet_step(unet: Any, config: dict[str, Any]) -> Case:
    random = np.random.default_rng(0)
    edge = config["sample_size"]
    given = {
        "latents": (2, config["in_channels"], edge, edge),
        "encoder_hidden_states": (2, 77, config["cross_attention_dim"]),
    }
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in given.items()}
    return lambda: unet(["noise_pred"], timestep=np.array([500, 500], np.float32), **arrays)


def unet(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from diptych.models.clip_text import ClipText, ClipTextConfig
    from diptych.models.unet import UNet, UNetConfig
    from diptych.models.vae import Vae, VaeConfig
    from diptych.runtimes import on_onnxruntime, on_openvino
    from diptych.runtimes.export_generator import write_networks

    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=32,
        block_out_channels=(128, 256, 384),
        layers_per_block=2,
        down_attention=(True, True, True),
        transformer_layers_per_block=(1, 1, 1),
        num_attention_heads=(4, 8, 8),
        cross_attention_dim=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "text_encoder": ClipText(ClipTextConfig.tiny()),
            "unet": UNet(config).eval(),
            "vae": Vae(VaeConfig.tiny()),
        }
        files = write_networks(made, Path(folder), precision="fp32")
        wanted = dataclasses.asdict(config)
        opened = {
            "onnxruntime": on_onnxruntime.open_generator_files(files, wanted),
            "openvino": on_openvino.open_generator_files(files, wanted, "float32"),
        }
        cases = {name: _unet_step(each["unet"], wanted) for name, each in opened.items()}
        yield from _side_by_side({"step": cases}, options.repeats)


def start(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    calls = {
        "caption": f"Captioner.load({options.captioner!r}, runtime=%r).caption({str(PHOTO)!r})",
        "picture, 1 step": f"ImageGenerator.load({options.generator!r}, runtime=%r)"
        f".generate({PROMPT!r}, seed=1, num_inference_steps=1)",
    }
    for task, call in calls.items():
        for runtime in RUNTIMES:
            code = f"from diptych import Captioner, ImageGenerator; {call % runtime}"
            yield {"task": task, "runtime": runtime, **whole_process(python("-c", code))}


def _side_by_side(tasks: dict[str, dict[str, Case]], repeats: int) -> Iterator[dict[str, Any]]:
    for task, cases in tasks.items():
        times = take_turns({name: _in_a_row(case) for name, case in cases.items()}, repeats)
        for runtime, figures in times.items():
            ratio = times["onnxruntime"]["median_s"] / figures["median_s"]
            least = times["onnxruntime"]["min_s"] / figures["min_s"]
            yield {
                "task": task,
                "runtime": runtime,
                **figures,
                "faster": round(ratio, 2),
                "faster_by_min": round(least, 2),
            }


def _in_a_row(case: Case) -> Case:
    """Return five calls: the first finds what the other runtime left in caches and threads."""

    def run() -> None:
        for _ in range(5):
            case()

    return run


MEASURES = {"captioner": captioner, "generator": generator, "unet": unet, "start": start}

if __name__ == "__main__":
    main(sys.argv[1:])
