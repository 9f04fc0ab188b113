"""Read the training pictures into memory once and cut a fresh view of each at every step."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from duplicates import left_out


@dataclass(frozen=True)
class Labelled:
    """Hold pictures [N, 3, H, W] uint8 and class numbers [N]."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Captioned:
    """Hold photos [N, 3, H, W] uint8 and a list of captions each."""

    pixels: Tensor
    captions: list[list[str]]


def check_there(folder: Path) -> None:
    """End the stage with one sentence where the data are not."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder: see 'The data' in the recipe's README")


def tiny_imagenet(folder: Path, split: str) -> Labelled:
    """Read one split of Tiny-ImageNet-200."""
    check_there(folder)
    index = np.load(folder / f"{split}_index.npz")
    offset, data = index["offset"], (folder / f"{split}.bin").read_bytes()
    pictures = [
        np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in pairwise(offset)
    ]
    return Labelled(as_planes(pictures), torch.from_numpy(index["label"].astype(np.int64)))


def captioned_rows(folder: Path, splits: set[str]) -> list[dict[str, Any]]:
    """Return the rows of some splits, without training photos that show a held-out one."""
    check_there(folder)
    with (folder / "captions.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    without = left_out(folder.name)
    return [row for row in rows if row["split"] in splits and row["file"] not in without]


def captioned(folder: Path, splits: set[str], size: int) -> Captioned:
    """Read the photos and captions of some splits, each photo squashed to a square."""
    rows, pictures = captioned_rows(folder, splits), []
    for row in rows:
        with Image.open(folder / row["file"]) as photo:
            squashed = photo.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            pictures.append(np.asarray(squashed))
    return Captioned(as_planes(pictures), [row["captions"] for row in rows])


def as_planes(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def clean(caption: str) -> str:
    """Keep the words of a caption: lower case, no punctuation but ' and - inside words."""
    return " ".join(re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", caption.lower()))


def views(pixels: Tensor, size: int, smallest_crop: float, generator: torch.Generator) -> Tensor:
    """Cut a random view of each picture [B, 3, H, W] uint8 and return [B, 3, size, size] in -1..1.

    Width and height of the crop are drawn apart, so that the squashed photos of the training set
    are seen in many aspect ratios; half of the views are mirrored, brightness, contrast and
    saturation vary. `generator` lives where the pixels do, for a GPU would wait for what it sends.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=generator, device=device)
        return drawn * (high - low) + low

    scale = uniform(smallest_crop, 1.0, 2)
    shift = (1 - scale) * uniform(-1.0, 1.0, 2)
    mirror = (uniform(0.0, 1.0) < 0.5).float() * -2 + 1
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0] * mirror, scale[:, 1]
    theta[:, :, 2] = shift
    brightness, contrast = uniform(-0.25, 0.25, 1, 1, 1), uniform(0.7, 1.3, 1, 1, 1)
    saturation = uniform(0.6, 1.4, 1, 1, 1)

    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    picture = pixels.float() / 127.5 - 1
    picture = F.grid_sample(picture, grid, padding_mode="reflection", align_corners=False)
    grey = picture.mean(1, keepdim=True)
    picture = grey + (picture - grey) * saturation
    return (picture * contrast + brightness).clamp(-1, 1)


def mixed(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Paste a piece of another picture into each of `pixels` (CutMix: Yun et al. 2019).

    Returns the pictures, from which row the piece of each came, and the share that stayed.
    """
    height, width = pixels.shape[2:]
    side = (1 - torch.rand(1, generator=generator).item()) ** 0.5
    top, left = (torch.rand(2, generator=generator) * (1 - side)).tolist()
    rows = slice(round(top * height), round((top + side) * height))
    columns = slice(round(left * width), round((left + side) * width))
    other = torch.randperm(len(pixels), generator=generator).to(pixels.device, non_blocking=True)
    pixels = pixels.clone()
    pixels[:, :, rows, columns] = pixels[other][:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return pixels, other, 1 - area / (height * width)


def plain(pixels: Tensor, size: int) -> Tensor:
    """Resize pictures [B, 3, H, W] uint8 without any chance; [B, 3, size, size] in -1..1."""
    picture = pixels.float()
    if picture.shape[-1] != size:
        picture = F.interpolate(picture, (size, size), mode="bilinear", antialias=True)
    return picture / 127.5 - 1
