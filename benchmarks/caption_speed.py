"""How fast are captions beside transformers 5, on the same full-size random weights?

    python benchmarks/caption_speed.py [--repeats 5] [--keep FOLDER] [--record]

ViT-B/16 + GPT-2 with cross-attention, 239 M parameters, 224 pixels, 16 new tokens. Every figure
goes from a decoded photo to text, processor and tokenizer included. All sides take turns in one
process; peak memory and cold start are those of fresh processes.

optimum takes its turns where it is installed, which asks for transformers 4: give it an environment
of its own, with `pip install 'transformers<4.58' optimum-onnx openvino` and this package.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych import Captioner, export
from harness import instructions, machine, python, record, take_turns, whole_process

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TASKS: dict[str, dict[str, Any]] = {
    "greedy-16": {"photos": 1, "num_beams": 1},
    "beam-4": {"photos": 1, "num_beams": 4},
    "batch-8": {"photos": 8, "num_beams": 1},
}
LENGTH = {"max_new_tokens": 16, "min_length": 17}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep the model files there for the next time")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        make_models(folder)
        results = speed(folder, options.repeats) + processes(folder)
    for result in results:
        print(
            "  ".join(f"{k}={v:.3f}" if isinstance(v, float) else str(v) for k, v in result.items())
        )
    print(machine())
    if options.record:
        print(record(results, "caption_speed"))


def make_models(folder: Path) -> None:
    """Write the random checkpoint with transformers, and our exports of it."""
    from tiny_models import make_captioner, write_json

    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").exists():
        width = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        encoder = {**width, "intermediate_size": 3072, "image_size": 224, "patch_size": 16}
        decoder = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768}
        make_captioner(
            checkpoint,
            0,
            encoder={**encoder, "initializer_range": 0.06},
            decoder={**decoder, "n_layer": 12, "n_head": 12, "initializer_range": 0.06},
        )
        write_json(checkpoint / "preprocessor_config.json", size={"height": 224, "width": 224})
        make_photo(0).save(folder / "photo.jpg", quality=95)
    ways: dict[str, dict[str, Any]] = {
        "fp32": {},
        "int8": {"quantize": "int8"},
        "int8-fixed": {"quantize": "int8", "calibration": [make_photo(i) for i in range(20, 36)]},
        "int4": {"quantize": "int4"},
    }
    for name, settings in ways.items():
        if not (folder / name / "artifact.json").exists():
            export(
                checkpoint,
                folder / name,
                **settings,
                images=[make_photo(seed) for seed in range(9, 13)],
                measure=False,
                force=True,  # random weights: every word is a near tie
            )


def make_photo(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((640, 480), Image.Resampling.BICUBIC)


def speed(folder: Path, repeats: int) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    checkpoint = folder / "checkpoint"
    peers = {"transformers": transformers_captioner(checkpoint)}
    if find_spec("optimum"):
        peers |= optimum_captioners(folder)
    ours = {
        "torch-fp32": Captioner.load(checkpoint, runtime="torch"),
        "onnx-fp32": Captioner.load(folder / "fp32"),
        "onnx-int8": Captioner.load(folder / "int8"),
        "onnx-int4": Captioner.load(folder / "int4"),
        "onnx-int8-fixed": Captioner.load(folder / "int8-fixed"),
        "openvino-int8": Captioner.load(folder / "int8", runtime="openvino"),
        "openvino-int8-fixed": Captioner.load(folder / "int8-fixed", runtime="openvino"),
    }
    if {"avx512_bf16", "amx_bf16"} & set(instructions()):
        ours |= {
            "torch-bf16": Captioner.load(checkpoint, runtime="torch", dtype="bfloat16"),
            "openvino-bf16": Captioner.load(folder / "fp32", runtime="openvino", dtype="bfloat16"),
        }
    results = []
    told = ", transformers 4" if "optimum-int8" in peers else ""
    for task, values in TASKS.items():
        photos = [make_photo(seed) for seed in range(values["photos"])]
        beams = {"num_beams": values["num_beams"], **LENGTH}
        said: dict[str, Any] = {}

        def case(
            name: str, call: Callable[[], Any], said: dict[str, Any] = said
        ) -> Callable[[], None]:
            def run() -> None:
                said[name] = call()

            return run

        cases = {
            name: case(name, lambda c=caption, p=photos, b=beams: c(p, **b))
            for name, caption in peers.items()
        }
        for name, captioner in ours.items():
            cases[name] = case(
                name,
                lambda c=captioner, p=photos, b=beams: [
                    x.token_ids for x in c.caption(p, batch_size=8, **b)
                ],
            )
        times = take_turns(cases, repeats)
        for name, figures in times.items():
            ratios = {
                "speed_ratio" if peer == "transformers" else f"speed_ratio_to_{peer}": (
                    times[peer]["median_s"] / figures["median_s"]
                )
                for peer in peers
            }
            same = said[name] == said["transformers"]
            results.append(
                {"task": task + told, "side": name, **figures, **ratios, "same_tokens": same}
            )
    return results


def transformers_captioner(checkpoint: Path) -> Callable[..., Any]:
    from transformers import VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(checkpoint).eval()
    return _generating(model, checkpoint)


def optimum_captioners(folder: Path) -> dict[str, Callable[..., Any]]:
    """Return optimum's captioners over ONNX Runtime: float32, and int8 as its guide makes it."""
    from optimum.onnxruntime import ORTModelForVision2Seq, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    checkpoint, whole, small = (folder / n for n in ("checkpoint", "optimum", "optimum-int8"))
    if not whole.exists():
        ORTModelForVision2Seq.from_pretrained(checkpoint, export=True).save_pretrained(whole)
    if not small.exists():
        chosen = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        for file in sorted(whole.glob("*.onnx")):
            quantizer = ORTQuantizer.from_pretrained(whole, file_name=file.name)
            quantizer.quantize(save_dir=small, quantization_config=chosen)
    names = {f"{part}_file_name": f"{part}_model_quantized.onnx" for part in ("encoder", "decoder")}
    names["decoder_with_past_file_name"] = "decoder_with_past_model_quantized.onnx"
    return {
        "optimum-fp32": _generating(ORTModelForVision2Seq.from_pretrained(whole), checkpoint),
        "optimum-int8": _generating(
            ORTModelForVision2Seq.from_pretrained(small, **names), checkpoint
        ),
    }


def _generating(model: Any, checkpoint: Path) -> Callable[..., Any]:
    import torch
    import transformers

    # Version 5 has one of torch by the old name, which needs torchvision.
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor = kind.from_pretrained(checkpoint)

    def caption(photos: list[Image.Image], **options: Any) -> list[tuple[int, ...]]:
        pixels = processor(photos, return_tensors="pt").pixel_values
        with torch.inference_mode():
            ids = model.generate(pixels, **options)
        return [tuple(row) for row in ids[:, 1:].tolist()]

    return caption


def processes(folder: Path) -> list[dict[str, Any]]:
    """Measure fresh processes from start to one printed caption, beam 4."""
    photo = str(folder / "photo.jpg")
    script = (
        "import sys, torch\n"
        "from PIL import Image\n"
        "from transformers import VisionEncoderDecoderModel, ViTImageProcessorPil\n"
        "model = VisionEncoderDecoderModel.from_pretrained(sys.argv[1])\n"
        "processor = ViTImageProcessorPil.from_pretrained(sys.argv[1])\n"
        "pixels = processor(Image.open(sys.argv[2]), return_tensors='pt').pixel_values\n"
        "with torch.inference_mode():\n"
        "    print(model.generate(pixels, num_beams=4, max_new_tokens=16, min_length=17))\n"
    )
    ours = ("--num-beams", "4", "--max-new-tokens", "16", "--min-length", "17")
    commands = {
        "transformers": python("-c", script, str(folder / "checkpoint"), photo),
        "torch-fp32": cli(photo, "-m", str(folder / "checkpoint"), "--runtime", "torch", *ours),
        "onnx-fp32": cli(photo, "-m", str(folder / "fp32"), *ours),
        "onnx-int8": cli(photo, "-m", str(folder / "int8"), *ours),
        "onnx-int8-fixed": cli(photo, "-m", str(folder / "int8-fixed"), *ours),
        "onnx-int4": cli(photo, "-m", str(folder / "int4"), *ours),
        "embedded default": cli(photo),
    }
    return [
        {"task": "cold process", "side": name, **whole_process(command)}
        for name, command in commands.items()
    ]


def cli(*arguments: str) -> list[str]:
    return python("-m", "diptych", "caption", *arguments)


if __name__ == "__main__":
    main()
