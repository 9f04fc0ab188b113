"""Load the networks that measures are made with."""

from __future__ import annotations

from pathlib import Path

import torch

from diptych.errors import BadInput
from diptych.models.alexnet import AlexNet
from diptych.weights.dialects import alexnet
from diptych.weights.files import read_checkpoint
from diptych.weights.load_module import Reader, Source, fill, unfilled

__all__ = ["load_alexnet"]


def load_alexnet(path: str | Path) -> AlexNet:
    """Load torchvision's AlexNet from a file (safetensors, or its own `.pth`).

    Raises `BadInput` where there is no such file, `WeightsMismatch` for one of another network.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise BadInput(f"there is no file {path}: give the weights of torchvision's AlexNet")
    with unfilled():
        module = AlexNet()
    stored = read_checkpoint([path])
    fill(
        module,
        Source(path.name, alexnet, [path], stored),
        Reader(torch.device("cpu"), torch.float32),
    )
    return module.eval().requires_grad_(False)
