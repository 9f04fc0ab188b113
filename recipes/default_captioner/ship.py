"""Stage 5: write the best model as the files that diptych embeds.

    python recipes/default_captioner/ship.py [config.toml] [folder]

An fp16 checkpoint for torch, and an int8 artifact that runs without it; both in one folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning import START, new_model, read_split
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.runtimes.export import Belongings, export_captioner
from diptych.runtimes.smaller_captioner import Shrinking
from diptych.text import Gpt2Tokenizer
from diptych.training.state import read_average
from diptych.weights.save import save_captioner
from pictures import plain

EMBEDDED = Path(__file__).parents[2] / "src" / "diptych" / "weights" / "embedded" / "captioner"
NAME = "diptych/default-captioner"


def main(config: dict[str, Any], folder: Path) -> None:
    output = Path(config["output"])
    model = new_model(config).eval()
    state = output / f"{config['ship']['weights']}.safetensors"
    weights = {k.removeprefix("model."): v for k, v in read_average(state).items()}
    weights = {k: v for k, v in weights.items() if not k.startswith("words.")}
    # What is shipped in fp16 is what is exported: both runtimes then start from equal numbers.
    model.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    temper(model, config["ship"]["temperature"])
    size = config["encoder"]["image_size"]
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    generation = {
        "decoder_start_token_id": START,
        "bos_token_id": START,
        "eos_token_id": START,
        "pad_token_id": START,
        **config["generation"],
    }
    tokenizer_path = output / "tokenizer.json"
    tokenizer = Gpt2Tokenizer.load(tokenizer_path)
    val = read_split(config, tokenizer, training=False)
    images: list[np.ndarray] = [plain(one[None], size)[0].numpy() for one in val.pixels[:200]]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "captioner"
        report = export_captioner(
            model,
            made,
            Belongings(preprocessing, generation, tokenizer_path, {"name": NAME, "revision": None}),
            Shrinking(mode="int8", images=images),
        )
        checkpoint = Path(temporary) / "checkpoint"
        save_captioner(
            model,
            checkpoint,
            preprocessing=preprocessing,
            generation=generation,
            tokenizer=tokenizer_path,
            dtype=torch.float16,
        )
        shutil.copytree(checkpoint, made, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
    print(report)
    total = 0
    for file in sorted(folder.iterdir()):
        total += file.stat().st_size
        print(f"{file.name:32}{file.stat().st_size / 1e6:8.2f} MB")
    print(f"{'together':32}{total / 1e6:8.2f} MB")


@torch.no_grad()
def temper(model: VisionEncoderDecoder, temperature: float) -> None:
    """Divide the logits by `temperature`, in the weights (Guo et al. 2017).

    Self-critical training leaves a decoder far too sure of its words. The likeliest words stay, the
    probabilities fall to what fits people's captions of the validation photos best.
    """
    for parameter in model.decoder.ln_f.parameters():
        parameter /= temperature


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else EMBEDDED
    main(tomllib.loads(Path(path).read_text()), where)
