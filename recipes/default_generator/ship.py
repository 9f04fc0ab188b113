"""Stage 5: write the trained networks as the folder that ships.

    python recipes/default_generator/ship.py [config.toml] [folder]

The checkpoint in the layout of diffusers, float16, and beside it the ONNX networks that run
without torch, on the same weights. The normalisation of the latents moves into the 1x1
convolutions on both sides of them, so that the scaling factor is 1.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import configs
from diptych.models.vae import Vae
from diptych.runtimes.export_generator import export_generator
from diptych.weights.generator_files import GeneratorFolder
from diptych.weights.save_generator import describe_configs
from diptych.weights.tokenizer_files import find_tokenizer
from train import painted, schedule_config
from train_vae import trained

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "src" / "diptych" / "weights" / "embedded" / "generator"


def main() -> None:
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else EMBEDDED
    config = configs.asked()
    modules = networks(config)
    model = described(config, modules, folder)
    precision = config["ship"]["precision"]
    report = export_generator(modules, model, folder, precision=precision, checkpoint=True)
    print(report)


def networks(config: dict[str, Any]) -> dict[str, nn.Module]:
    """Return the trained networks by name; the autoencoder speaks normalised latents."""
    painter = painted(config)
    return {
        "text_encoder": painter.text_encoder,
        "unet": painter.unet,
        "vae": normalised(trained(config, torch.device("cpu")), *statistics(config)),
    }


def described(
    config: dict[str, Any], modules: dict[str, nn.Module], folder: Path
) -> GeneratorFolder:
    return GeneratorFolder(
        path=folder,
        name="default",
        revision=None,
        family="diptych",
        configs=describe_configs(modules),
        schedule=dataclasses.asdict(schedule_config(config)),
        tokenizers={"tokenizer": find_tokenizer(Path(config["output"]) / "tokenizer")},
        weights={},
        layout="diffusers",
        networks={},
        precision=None,
        defaults=config["defaults"],
    )


def statistics(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with safe_open(Path(config["output"]) / "latents.safetensors", "pt") as file:
        return file.get_tensor("mean"), file.get_tensor("std")


@torch.no_grad()
def normalised(vae: Vae, mean: Tensor, std: Tensor) -> Vae:
    """Fold (latents - mean) / std into what follows the encoder; undo it before the decoder."""
    assert vae.quant_conv is not None
    assert vae.post_quant_conv is not None
    assert vae.quant_conv.bias is not None
    assert vae.post_quant_conv.bias is not None
    count = len(mean)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    bias[:count] = (bias[:count] - mean) / std
    weight[:count] /= std[:, None, None, None]
    bias[count:] -= 2 * std.log()
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    bias += weight[:, :, 0, 0] @ mean
    weight *= std[None, :, None, None]
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0)
    return vae


if __name__ == "__main__":
    main()
