"""Train a small judge that tells which of ten prompts a picture was made for.

    python recipes/default_generator/scorer.py runs/scorer.pt

Two towers into one space (Radford et al. 2021): a small convolutional network for pictures of
64 × 64, and a bag of words and of letter triples for prompts, so that unseen words still say
something. It learns from the training split of the emoji and flowers and is measured on the
held-out originals: what it scores there is the most that generated pictures can be expected to
reach. It judges our own evaluations only, and is not shipped.
"""

from __future__ import annotations

import argparse
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from diptych.evaluation.image_metrics import Retrieval, retrieval
from pictures import Captioned, photographs

SIDE = 64
BUCKETS = 6144
WIDTH = 160
# Words that say nothing about the picture, or that tell only which set it is from.
SILENT = frozenset(["a", "an", "the", "of", "and", "with", "emoji", "flat", "photo", "flower"])
MIRRORED = frozenset(["left", "right", "leftwards", "rightwards", "clockwise", "anticlockwise"])


# --- the two towers -------------------------------------------------------------------------------


def features(prompt: str) -> list[int]:
    """Return the buckets of a prompt's words and of their letter triples."""
    words = [word for word in re.findall(r"[a-z0-9]+", prompt.lower()) if word not in SILENT]
    found = [f"={word}" for word in words]
    for word in (f"<{word.removesuffix('s')}>" for word in words):
        found += [word[i : i + 3] for i in range(len(word) - 2)]
    return [zlib.crc32(each.encode()) % BUCKETS for each in found] or [0]


class Scorer(nn.Module):
    """Embed pictures [B, 3, 64, 64] in 0 to 1 and prompts into one space of 160 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            _convolution(3, 32),
            _convolution(32, 64),
            _convolution(64, 96),
            _Residual(96),
            _convolution(96, 192),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(192, WIDTH),
        )
        self.words = nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean")
        self.prompt = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def of_pictures(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.picture(pixels * 2.0 - 1.0), dim=1)

    def of_prompts(self, prompts: Sequence[str]) -> Tensor:
        found = [features(prompt) for prompt in prompts]
        starts = np.cumsum([0, *(len(each) for each in found[:-1])])
        flat = torch.tensor([bucket for each in found for bucket in each])
        return F.normalize(self.prompt(self.words(flat, torch.from_numpy(starts))), dim=1)

    @torch.no_grad()
    def scores(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> NDArray[np.float32]:
        """Compare B pictures with P prompts: [B, P], higher fits better."""
        self.eval()
        pixels = torch.cat([shrunk(np.asarray(each.convert("RGB"))[None]) for each in pictures])
        made = torch.cat([self.of_pictures(part / 255.0) for part in pixels.split(128)])
        return (made @ self.of_prompts(prompts).T).numpy()


def _convolution(channels: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, values: Tensor) -> Tensor:
        return values + F.relu(self.norm(self.convolution(values)))


def load(path: Path) -> Scorer:
    scorer = Scorer()
    scorer.load_state_dict(torch.load(path, weights_only=True))
    return scorer.eval()


def shrunk(pictures: NDArray[np.uint8]) -> Tensor:
    """Bring [N, H, W, 3] uint8 to [N, 3, 64, 64] float32, 0 to 255."""
    planes = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float()
    return F.interpolate(planes, (SIDE, SIDE), mode="area")


# --- how good is it -------------------------------------------------------------------------------


def different(captions: Sequence[Sequence[str]]) -> tuple[list[str], list[int]]:
    """Return the different last captions, and for each picture the number of its own."""
    own = [each[-1] for each in captions]
    prompts = list(dict.fromkeys(own))
    return prompts, [prompts.index(each) for each in own]


def on_originals(scorer: Scorer, originals: Captioned) -> Retrieval:
    prompts, right = different(originals.captions)
    pictures = [Image.fromarray(each) for each in originals.pictures]
    return retrieval(scorer.scores(pictures, prompts), right)


# --- training -------------------------------------------------------------------------------------


def train(data: Path, epochs: int, seed: int, report: bool = True) -> Scorer:
    """Train on the training split; every batch holds four emoji to one flower."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    emoji, flowers = (photographs(data, domain, "train") for domain in ("emoji", "flowers"))
    held_out = {domain: photographs(data, domain, "val") for domain in ("emoji", "flowers")}
    emoji_pixels, flower_pixels = shrunk(emoji.pictures), shrunk(flowers.pictures)
    scorer = Scorer()
    optimizer = torch.optim.AdamW(scorer.parameters(), 2e-3, weight_decay=0.05)
    rounds = len(emoji) // 160
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=epochs * rounds, pct_start=0.1
    )
    for epoch in range(epochs):
        scorer.train()
        total = 0.0
        for rows in rng.permutation(len(emoji))[: rounds * 160].reshape(rounds, 160):
            others = rng.integers(len(flowers), size=32)
            pixels = torch.cat([emoji_pixels[rows], flower_pixels[others]])
            captions = [emoji.captions[row] for row in rows]
            captions += [flowers.captions[row] for row in others]
            loss = _loss(scorer, _varied(pixels, captions, rng), captions)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if report and epoch % 5 == 4:
            for domain, originals in held_out.items():
                print(f"epoch {epoch + 1}: {domain} {on_originals(scorer, originals)}", flush=True)
            print(f"epoch {epoch + 1}: loss {total / rounds:.3f}", flush=True)
    return scorer.eval()


def _loss(scorer: Scorer, pixels: Tensor, captions: list[list[str]]) -> Tensor:
    """Tell each picture from the others' prompts and back; equal prompts share the blame."""
    said = [each[-1] for each in captions]
    made, meant = scorer.of_pictures(pixels), scorer.of_prompts(said)
    logits = made @ meant.T * scorer.log_scale.exp().clamp(max=50.0)
    same = torch.tensor([[float(a == b) for b in said] for a in said])
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _varied(pixels: Tensor, captions: list[list[str]], rng: np.random.Generator) -> Tensor:
    """Move, scale, mirror, tint and blur, as a generator's pictures differ from originals."""
    count = len(pixels)
    scale = torch.from_numpy(rng.uniform(0.85, 1.2, count)).float()
    mirror = torch.tensor(
        [
            -1.0 if rng.random() < 0.5 and not MIRRORED & set(each[-1].split()) else 1.0
            for each in captions
        ]
    )
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0], turn[:, 1, 1] = scale * mirror, scale
    turn[:, :, 2] = torch.from_numpy(rng.uniform(-0.12, 0.12, (count, 2))).float()
    grid = F.affine_grid(turn, [count, 3, SIDE, SIDE], align_corners=False)
    moved = F.grid_sample(pixels / 255.0, grid, padding_mode="border", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2, mode="bilinear")
    blur = torch.from_numpy(
        rng.uniform(0, 1, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    )
    moved = torch.lerp(moved, coarse, blur.float())
    tint = torch.from_numpy(rng.normal(1.0, 0.06, (count, 3, 1, 1))).float()
    noise = 0.02 * torch.from_numpy(rng.standard_normal(tuple(moved.shape), dtype=np.float32))
    return (moved * tint + noise).clamp(0.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scorer = train(arguments.data, arguments.epochs, arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(scorer.state_dict(), arguments.output)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
