"""Load the small decoder that previews are made with."""

from __future__ import annotations

from pathlib import Path

import torch

from diptych.errors import UnknownModel
from diptych.inputs import at_home
from diptych.models.tiny_vae import TinyVae, TinyVaeConfig
from diptych.weights.dialects import tiny_vae
from diptych.weights.files import contents, read_checkpoint, read_document
from diptych.weights.load_module import Reader, Source, as_device, fill, unfilled

__all__ = ["load_tiny_vae"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load_tiny_vae(folder: str | Path, device: str = "cpu") -> TinyVae:
    """Load a folder of diffusers' AutoencoderTiny, as TAESD is published, in float32.

    Raises `UnknownModel` where there is none, `UnsupportedModel` for another kind of network and
    `WeightsMismatch` for weights that are not its own.
    """
    folder = at_home(folder)
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None or not (folder / "config.json").is_file():
        found = f" ({contents(folder)})" if folder.is_dir() else ""
        raise UnknownModel(
            f"{folder} holds no tiny VAE{found}: give a folder with the config.json and "
            f"{_WEIGHTS[0]} of an AutoencoderTiny, such as TAESD"
        )
    config = tiny_vae.read_config(read_document(folder, "config.json"))
    with unfilled():
        module = TinyVae(TinyVaeConfig(**config))
    source = Source(str(folder), tiny_vae, [path], read_checkpoint([path]))
    fill(module, source, Reader(as_device(device), torch.float32), check_finite=True)
    return module.eval().requires_grad_(False)
