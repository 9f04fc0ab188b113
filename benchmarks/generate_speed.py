"""How fast are pictures beside diffusers, on the same full-size random weights of SD 1.5?

    python benchmarks/generate_speed.py [--parts float32 bfloat16 …] [--sides ours diffusers]
        [--size 512] [--narrow-size 64] [--repeats 3] [--keep FOLDER] [--record] [--quick]

UNet of 860 M parameters, VAE and CLIP ViT-L, written once by diffusers and loaded by both sides
from the same files. Both take turns in one process; peak memory, import and load are those of
fresh processes. One part a question:

- float32, bfloat16: a step with guidance (the UNet on two rows), the VAE, a picture of two steps
- onnx: a step and the VAE from ONNX files in float32, in ONNX Runtime and in OpenVINO
- int8: in OpenVINO, the UNet in 8 bits by ranges of two prompts and the rest in bfloat16, beside
  diffusers in bfloat16 (or both in float32); how far the picture is from diffusers' in float32
- memory: a process that imports, loads and draws; its peak, and how long each took
- import: what `import` alone costs
- embedded: the default generator, which needs no torch
- cuda: whole pictures of 20 steps, beside diffusers as it is; with `--compiled` also both compiled,
  which takes minutes

Where a processor has no instructions for bfloat16, torch takes minutes for a step at 512 pixels:
bfloat16 is measured at 64 pixels there, or at `--narrow-size`. `--quick` takes a tiny model, to see
that all this works. diffusers loads better with the package accelerate; `machine` tells its version
where it was there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness import machine, python, record, take_turns, whole_process

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PARTS = ("float32", "bfloat16", "onnx", "int8", "memory", "import", "embedded", "cuda")
SIDES = ("ours", "diffusers")
PROMPT = "a harbour at dawn, boats, calm water"
CALIBRATION = ("a street in the rain, neon signs", "portrait of an old man, oil on canvas")
EMBEDDED_PROMPT = "a red circle left of a blue square"
Case = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Say what is measured, and on what."""

    folder: Path
    sides: tuple[str, ...]
    size: int
    narrow_size: int
    repeats: int
    steps: int = 2
    compiled: bool = False
    types: tuple[str, ...] = ("bfloat16", "float16")

    def size_for(self, dtype: str) -> int:
        return self.size if dtype == "float32" else self.narrow_size


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        setting = _setting(options, options.keep or Path(temporary))
        results = []
        for part in options.parts:
            for result in MEASURES[part](setting):
                results.append({"part": part, **result, "threads": _threads()})
                tell(results[-1])
    print(machine())
    if options.record:
        print(record(results, "generate_speed"))
    return results


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--size", type=int, help="pixels of an edge; 512, or 64 with --quick")
    parser.add_argument("--narrow-size", type=int, help="the same for bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the model files there for the next time")
    parser.add_argument("--quick", action="store_true", help="a tiny model instead")
    parser.add_argument("--compiled", action="store_true", help="cuda: compiled sides as well")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float16"], help="cuda: dtypes")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    size = options.size or (64 if options.quick else 512)
    narrow = options.narrow_size
    if narrow is None:
        from diptych.runtimes.on_torch_widened import multiplies

        narrow = size if multiplies(_torch().bfloat16) else 64
    if {"float32", "bfloat16", "onnx", "int8", "memory", "cuda"} & set(options.parts):
        _silence()
        make_model(folder, quick=options.quick)
    return Setting(
        folder,
        tuple(options.sides),
        size,
        narrow,
        options.repeats,
        compiled=options.compiled,
        types=tuple(options.types),
    )


def make_model(folder: Path, *, quick: bool) -> None:
    """Write the random pipeline with diffusers, unless it is there."""
    if (folder / "model_index.json").exists():
        return
    from tiny_pipelines import make_pipeline

    progress("writing the model")
    scheduler = (
        "DDIMScheduler",
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    )
    if quick:
        make_pipeline(folder, "sd1", 0, scheduler=scheduler)
        return
    _make_full_size(folder, scheduler)


def _make_full_size(folder: Path, scheduler: tuple[str, dict[str, Any]]) -> None:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from tiny_pipelines import make_tokenizer

    _torch().manual_seed(0)
    name, config = scheduler
    channels = (128, 256, 512, 512)
    pipeline = diffusers.StableDiffusionPipeline(
        tokenizer=make_tokenizer(full_vocabulary=True),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                eos_token_id=49407,
            )
        ),
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=diffusers.AutoencoderKL(
            sample_size=512,
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=2,
        ),
        scheduler=getattr(diffusers, name)(**config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


# --- side by side ---------------------------------------------------------------------------------


def side_by_side(
    setting: Setting, dtype: str, artifact: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Measure a step, the VAE and a small picture; both sides in turn.

    With `artifact` ours runs that in OpenVINO.
    """
    torch = _torch()
    size = setting.size_for(dtype)
    tasks: dict[str, dict[str, Case]] = {"step": {}, "vae": {}, "picture": {}}
    for side in setting.sides:
        progress(f"{side}: loading {dtype}")
        loaded = (
            _diffusers(setting, dtype, size)
            if side == "diffusers"
            else _ours(setting, dtype, size, artifact)
        )
        for task, case in loaded.items():
            tasks[task][side] = case
    for task, cases in tasks.items():
        # A picture is made of what ran before: it needs no warming up, and is long enough.
        is_whole = task == "picture"
        is_slow = is_whole or size != setting.size
        made: dict[str, Any] = {}
        turns = {side: _watched(task, side, case, made) for side, case in cases.items()}
        repeats = max(1, setting.repeats // 3) if is_slow else setting.repeats
        with torch.inference_mode():
            times = take_turns(turns, repeats, warmup=0 if is_slow else 1)
        agreement = _agreement(made, whole=is_whole)
        for side, figures in times.items():
            yield {
                "task": task,
                "side": side,
                "dtype": dtype,
                "size": size,
                **figures,
                **_ratio(times, figures),
                **agreement,
            }
    tasks.clear()
    gc.collect()


def int8(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the UNet in 8 bits and the rest in bfloat16, in OpenVINO.

    In float32 where the processor has no bfloat16.
    """
    import diptych
    from diptych.runtimes.on_torch_widened import multiplies

    artifact = setting.folder / "int8"
    if not artifact.exists():
        progress("exporting in 8 bits")
        words = {"quantize": "int8", "calibration": CALIBRATION, "measure": False, "force": True}
        diptych.export(setting.folder, artifact, task="text-to-image", **words)
        gc.collect()
    dtype = "bfloat16" if multiplies(_torch().bfloat16) else "float32"
    yield from side_by_side(setting, dtype, artifact)
    size = setting.size_for(dtype)
    made: dict[str, Any] = {}
    for side in SIDES:
        progress(f"{side}: a picture to compare")
        loaded = (
            _diffusers(setting, "float32", size)
            if side == "diffusers"
            else _ours(setting, dtype, size, artifact)
        )
        with _torch().inference_mode():
            made[side] = loaded["picture"]()
        del loaded
        gc.collect()
    told = {"task": "picture", "side": "ours", "beside": "diffusers float32", "size": size}
    yield {**told, **_agreement(made, whole=True)}


def onnx(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the ONNX networks of each runtime beside diffusers in float32."""
    from diptych import ImageGenerator
    from diptych.runtimes.export_generator import write_networks
    from diptych.weights.diffusion import describe_generator
    from diptych.weights.load_generator import load_generator

    size, folder = setting.size, setting.folder / "onnx"
    if not (folder / "unet.onnx").exists():
        progress("writing ONNX files")
        folder.mkdir(exist_ok=True)
        write_networks(load_generator(describe_generator(setting.folder)), folder)
    tasks: dict[str, dict[str, Case]] = {"step": {}, "vae": {}}
    theirs = _diffusers(setting, "float32", size)
    inputs = _inputs(size, ImageGenerator.load(setting.folder, runtime="torch"))
    step = {name: inputs[name] for name in ("latents", "timestep", "encoder_hidden_states")}
    for runtime in ("onnxruntime", "openvino"):
        unet, decoder = (_network(folder, name, runtime) for name in ("unet", "vae_decoder"))
        tasks["step"][runtime] = lambda unet=unet: unet(**step)[0]
        tasks["vae"][runtime] = lambda decoder=decoder: decoder(latents=inputs["latents"][:1])[0]
    for task, cases in tasks.items():
        cases["diffusers"] = theirs[task]
        made: dict[str, Any] = {}
        turns = {side: _watched(task, side, case, made) for side, case in cases.items()}
        with _torch().inference_mode():
            times = take_turns(turns, max(1, setting.repeats - 1))
        expected = np.asarray(_plain(made["diffusers"]), np.float64)
        for side, figures in times.items():
            apart = float(np.linalg.norm(_plain(made[side]) - expected) / np.linalg.norm(expected))
            ratio = _ratio(times, figures)
            told = {"task": task, "side": side, "dtype": "float32", "size": size}
            yield {**told, **figures, **ratio, "difference": apart}


def _network(folder: Path, name: str, runtime: str) -> Any:
    from diptych.runtimes import on_onnxruntime, on_openvino
    from diptych.runtimes.network import GENERATOR_NETWORKS
    from diptych.runtimes.onnx_networks import OnnxNetwork

    def open_vino(path: Path, needed: str, *, memory: Any) -> Any:
        return on_openvino.OpenVinoSession(path, needed, memory=memory, dtype="float32")

    opened = open_vino if runtime == "openvino" else on_onnxruntime.OnnxSession
    io = GENERATOR_NETWORKS[name]
    return OnnxNetwork(
        folder / f"{name}.onnx", *io, opened, memory="kept" if name == "unet" else "in pieces"
    )


def _ours(setting: Setting, dtype: str, size: int, artifact: Path | None = None) -> dict[str, Case]:
    from diptych import ImageGenerator

    model, runtime = (setting.folder, "torch") if artifact is None else (artifact, "openvino")
    generator = ImageGenerator.load(model, runtime=runtime, device="cpu", dtype=dtype)
    networks, inputs, turn = generator.networks, _inputs(size, generator), count()
    progress(f"ours: {networks.reason}")

    def draw() -> Image.Image:
        # Words change, or they would be remembered, which diffusers does not do.
        return generator.generate(
            f"{PROMPT} {next(turn)}", latents=inputs["noise"], num_inference_steps=setting.steps
        ).image

    step = {name: inputs[name] for name in ("latents", "timestep", "encoder_hidden_states")}
    return {
        "step": lambda: networks["unet"](**step)[0],
        "vae": lambda: networks["vae_decoder"](latents=inputs["latents"][:1])[0],
        "picture": draw,
    }


def _diffusers(setting: Setting, dtype: str, size: int) -> dict[str, Case]:
    torch = _torch()
    pipeline = _pipeline(setting.folder, dtype)
    inputs, turn = _inputs(size, pipeline), count()
    typed = {name: torch.as_tensor(each).to(getattr(torch, dtype)) for name, each in inputs.items()}
    words = {"guidance_scale": 7.5, "num_inference_steps": setting.steps}

    def draw() -> Image.Image:
        made = pipeline(
            f"{PROMPT} {next(turn)}", latents=typed["noise"], width=size, height=size, **words
        )
        return made.images[0]

    return {
        "step": lambda: (
            pipeline.unet(
                typed["latents"],
                torch.as_tensor(inputs["timestep"]),
                encoder_hidden_states=typed["encoder_hidden_states"],
            ).sample
        ),
        "vae": lambda: pipeline.vae.decode(typed["latents"][:1]).sample,
        "picture": draw,
    }


def _pipeline(folder: Path, dtype: str) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=getattr(_torch(), dtype), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _inputs(size: int, model: Any) -> dict[str, Any]:
    """Return what the networks are given; `model` of either side tells its width."""
    configs = getattr(getattr(model, "model", None), "configs", None)
    config = configs["unet"] if configs else model.unet.config
    random = np.random.default_rng(0)
    shape = (4, size // 8, size // 8)
    words = (2, 77, config["cross_attention_dim"])
    return {
        "latents": random.standard_normal((2, *shape), dtype=np.float32),
        "noise": random.standard_normal((1, *shape), dtype=np.float32),
        "timestep": np.array([501.0, 501.0], np.float32),
        "encoder_hidden_states": random.standard_normal(words, dtype=np.float32),
    }


def _watched(task: str, side: str, case: Case, made: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        start = time.perf_counter()
        made[side] = case()
        progress(f"{task} {side}: {time.perf_counter() - start:.2f} s")

    return run


def _agreement(made: Mapping[str, Any], *, whole: bool) -> dict[str, float]:
    """Say how far the two sides are apart: in dB for pictures, relative to the norm for tensors."""
    if len(made) < 2:
        return {}
    ours, theirs = (np.asarray(_plain(made[side]), np.float64) for side in SIDES)
    if not whole:
        return {"difference": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))}
    error = float(np.mean((ours - theirs) ** 2))
    return {"psnr_db": 10 * math.log10(255**2 / error) if error else 99.0}


def _plain(made: Any) -> Any:
    return made.float().cpu().numpy() if hasattr(made, "float") else made


def _ratio(times: Mapping[str, Mapping[str, float]], figures: Mapping[str, float]) -> Any:
    if "diffusers" not in times:
        return {}
    return {"speed_ratio": times["diffusers"]["median_s"] / figures["median_s"]}


# --- fresh processes ------------------------------------------------------------------------------

_PROCESSES = {
    "ours": """
from diptych import ImageGenerator
told["import_s"] = since()
generator = ImageGenerator.load(folder, runtime="torch", device="cpu", dtype=dtype)
told["load_s"] = since()
generator.generate("a harbour", num_inference_steps=1, width=size, height=size, seed=0)
""",
    "diffusers": """
import torch
from diffusers import StableDiffusionPipeline
told["import_s"] = since()
pipeline = StableDiffusionPipeline.from_pretrained(
    folder, dtype=getattr(torch, dtype), safety_checker=None
)
told["load_s"] = since()
pipeline("a harbour", num_inference_steps=1, width=size, height=size)
""",
}
_CLOCK = """
import json, sys, time
folder, dtype, size, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
told, last = {}, time.perf_counter()
def since():
    global last
    before, last = last, time.perf_counter()
    return last - before
"""


def memory(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure processes that import, load and draw one picture of one step."""
    for dtype in ("float32", "bfloat16"):
        size = setting.size_for(dtype)
        for side in setting.sides:
            progress(f"process {side} {dtype}")
            with tempfile.TemporaryDirectory() as temporary:
                out = Path(temporary) / "told.json"
                script = f"{_CLOCK}{_PROCESSES[side]}json.dump(told, open(out, 'w'))"
                command = python("-c", script, str(setting.folder), dtype, str(size), str(out))
                figures = whole_process(command, repeats=1)
                told = json.loads(out.read_text())
            yield {"side": side, "dtype": dtype, "size": size, **figures, **told}


def imports(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure what it costs to have the class at hand."""
    statements = {
        "bare python": "pass",
        "ours": "from diptych import ImageGenerator",
        "diffusers": "from diffusers import StableDiffusionPipeline",
    }
    for side, statement in statements.items():
        if side in (*setting.sides, "bare python"):
            yield {"side": side, **whole_process(python("-c", statement), setting.repeats)}


def embedded(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the default generator, if this checkout carries it."""
    from diptych import ImageGenerator
    from diptych.errors import UnknownModel

    try:
        generator = ImageGenerator.load()
    except UnknownModel as error:
        progress(str(error))
        return
    words = {"num_inference_steps": 20, "seed": 0}
    case = {"embedded": lambda: generator.generate(EMBEDDED_PROMPT, **words)}
    made = generator.generate(EMBEDDED_PROMPT, **words)
    kind = {
        "side": "embedded default",
        "dtype": generator.networks.dtype,
        "size": made.image.width,
        "guidance_scale": made.options.guidance_scale,
    }
    yield {"task": "20 steps", **kind, **take_turns(case, setting.repeats)["embedded"]}
    with tempfile.TemporaryDirectory() as temporary:
        command = python("-m", "diptych", "generate", EMBEDDED_PROMPT, "--steps", "20", "-q")
        command += ["--seed", "0", "-o", str(Path(temporary) / "picture.png")]
        yield {"task": "cold process", **kind, **whole_process(command, setting.repeats)}


# --- a GPU ----------------------------------------------------------------------------------------


def cuda(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure whole pictures of 20 steps with guidance, batch 1, on an NVIDIA card."""
    torch = _torch()
    if not torch.cuda.is_available():
        progress("no CUDA device here")
        return
    for dtype in setting.types:
        cases = _cuda_cases(setting, dtype)
        times = take_turns(cases, max(setting.repeats, 5), warmup=3)
        made = {side: case() for side, case in cases.items()}
        apart = _agreement({side.split()[0]: made[side] for side in reversed(made)}, whole=True)
        for side, figures in times.items():
            ratios = {
                f"speed_ratio_to_{other.split()[-1]}": each["median_s"] / figures["median_s"]
                for other, each in times.items()
                if other.startswith("diffusers")
            }
            yield {
                "task": "20 steps",
                "side": side,
                "dtype": dtype,
                "size": setting.size,
                **figures,
                **ratios,
                **(apart if side == "ours" else {}),
                "peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20,
                "card": torch.cuda.get_device_name(),
            }
        cases.clear()
        gc.collect()
        torch.cuda.empty_cache()


def _cuda_cases(setting: Setting, dtype: str) -> dict[str, Case]:
    """Return what draws the same picture by the same seed; memory of the card is that of all."""
    torch = _torch()
    size = setting.size
    words: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 7.5}
    words |= {"width": size, "height": size}
    noise = np.random.default_rng(0).standard_normal((1, 4, size // 8, size // 8), np.float32)
    ways = ("", " compiled") if setting.compiled else ("",)
    cases: dict[str, Case] = {}

    def ours(way: str) -> Case:
        from diptych import ImageGenerator

        generator = ImageGenerator.load(setting.folder, runtime="torch", device="cuda", dtype=dtype)
        if way:
            generator.compile()
        return lambda: generator.generate(PROMPT, latents=noise, **words).image

    def theirs(way: str) -> Case:
        pipeline = _pipeline(setting.folder, dtype).to("cuda")
        if way:
            pipeline.unet = torch.compile(pipeline.unet, mode="reduce-overhead")
        given = torch.from_numpy(noise).to("cuda", getattr(torch, dtype))
        return lambda: pipeline(PROMPT, latents=given, **words).images[0]

    for side, make in (("ours", ours), ("diffusers", theirs)):
        if side in setting.sides:
            for way in ways:
                cases[side + (way or " eager" * (side == "diffusers"))] = make(way)
    # Pictures end on the CPU, so every case waits for the card by itself.
    return cases


MEASURES: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "float32": lambda setting: side_by_side(setting, "float32"),
    "bfloat16": lambda setting: side_by_side(setting, "bfloat16"),
    "onnx": onnx,
    "int8": int8,
    "memory": memory,
    "import": imports,
    "embedded": embedded,
    "cuda": cuda,
}


def _silence() -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _torch() -> Any:
    import torch

    torch.set_num_threads(_threads())
    return torch


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def tell(result: Mapping[str, Any]) -> None:
    plain = ("part", "task", "side")
    told = [str(result[name]) for name in plain if name in result]
    told += [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in result.items()
        if name not in plain
    ]
    print("  ".join(told), flush=True)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
