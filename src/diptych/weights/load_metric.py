"""Load the networks that measures are made with."""

from __future__ import annotations

from pathlib import Path

import torch

from diptych.models.alexnet import AlexNet
from diptych.weights.dialects import alexnet
from diptych.weights.files import read_checkpoint
from diptych.weights.hub import resolve_file
from diptych.weights.load_module import Reader, Source, fill, unfilled

__all__ = ["load_alexnet"]


def load_alexnet(path: str | Path) -> AlexNet:
    """Load torchvision's AlexNet from a file (safetensors, or its own `.pth`), here or of the hub.

    Raises `UnknownModel` where there is no such file, `WeightsMismatch` for one of another network.
    """
    path = resolve_file(path)
    with unfilled():
        module = AlexNet()
    stored = read_checkpoint([path])
    fill(
        module,
        Source(path.name, alexnet, [path], stored),
        Reader(torch.device("cpu"), torch.float32),
    )
    return module.eval().requires_grad_(False)
