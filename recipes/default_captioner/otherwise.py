"""Teach the encoder to see without classes: by captions, or by what is covered.

    python recipes/default_captioner/otherwise.py [config.toml]

Only for ablations (`ablations.toml`), in place of `pretrain.py`; writes what that one writes.
`contrast` tells which caption belongs to which photo (CLIP: Radford et al. 2021); `masked` paints
covered patches of all pictures (SimMIM: Xie et al. 2022).
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning import EACH, IGNORED, Split, read_split
from diptych.models.gpt2 import Gpt2, Gpt2Config
from diptych.models.vit import ViT, ViTConfig
from diptych.text import Gpt2Tokenizer
from diptych.training.replay import Replay, set_rate
from diptych.training.state import Average, Log, decayed, learning_rate, save_state
from pictures import tiny_imagenet, views
from pretrain import adamw, encoder_config, initialise

WIDTH = 256  # of the space that pictures and sentences share
COVERED = 0.6  # share of the patches


class Contrast(nn.Module):
    """Draw a photo and its caption together, and all others of the batch apart."""

    def __init__(self, encoder: ViTConfig, decoder: Gpt2Config) -> None:
        super().__init__()
        self.encoder, self.reader = ViT(encoder), Gpt2(decoder)
        self.picture = nn.Linear(encoder.hidden_size, WIDTH)
        self.sentence = nn.Linear(decoder.hidden_size, WIDTH)
        self.sharpness = nn.Parameter(torch.tensor(2.7))

    def forward(self, pixels: Tensor, inputs: Tensor, ends: Tensor) -> Tensor:
        seen = F.normalize(self.picture(self.encoder(pixels).mean(1)).float(), dim=-1)
        hidden = self.reader(inputs)[0][torch.arange(len(inputs), device=ends.device), ends]
        read = F.normalize(self.sentence(hidden).float(), dim=-1)
        scores = seen @ read.T * self.sharpness.exp().clamp(max=100)
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


class Masked(nn.Module):
    """Paint the covered patches of a picture."""

    def __init__(self, encoder: ViTConfig) -> None:
        super().__init__()
        self.encoder, self.side = ViT(encoder), encoder.patch_size
        self.pixels = nn.Linear(encoder.hidden_size, 3 * self.side**2)

    def forward(self, pixels: Tensor, covered: Tensor) -> Tensor:
        """Take `covered` [B, patches], 1 where a patch is hidden, else 0."""
        across = pixels.shape[-1] // self.side
        cover = covered.unflatten(1, (1, across, across))
        cover = cover.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
        hidden = self.encoder(pixels * (1 - cover))[:, 1:]
        painted = self.pixels(hidden).float().transpose(1, 2)
        painted = F.fold(painted, pixels.shape[-2:], self.side, stride=self.side)
        return ((painted - pixels).abs() * cover).sum() / (3 * cover.sum())


def contrast_batch(train: Split, count: int, draws: torch.Generator) -> list[Tensor]:
    """Return rows of photos, and a caption of each with the place of its end."""
    device = train.pixels.device
    chosen = torch.randperm(len(train.pixels), generator=draws, device=device)[:count]
    which = torch.randint(EACH, (count,), generator=draws, device=device)
    ends = (train.targets[chosen, which] != IGNORED).sum(1) - 1
    return [chosen, train.inputs[chosen, which], ends]


def main(config: dict[str, Any]) -> None:
    options, output = config["otherwise"], Path(config["output"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config["seed"])
    torch.backends.cudnn.benchmark = True
    size, count, kind = options["image_size"], options["batch_size"], options["kind"]
    encoder = replace(encoder_config(config), image_size=size)
    decoder = Gpt2Config(**config["decoder"], add_cross_attention=False)
    train = read_split(config, Gpt2Tokenizer.load(output / "tokenizer.json"), training=True).to(
        device
    )
    module = Contrast(encoder, decoder) if kind == "contrast" else Masked(encoder)
    initialise(module)
    module.to(device)
    pictures = train.pixels
    if kind == "masked":
        small = F.interpolate(train.pixels.float(), (64, 64), mode="bilinear", antialias=True)
        more = tiny_imagenet(Path(config["data"]) / "tiny_imagenet_64", "train").pixels
        pictures = torch.cat([small.round().to(torch.uint8), more.to(device)])
    average = Average(module, options["ema_decay"])
    optimizer = adamw(
        decayed(module.named_parameters(), options["weight_decay"]), device, (0.9, 0.98)
    )

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = module(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return (loss.detach(),)

    learn = Replay(device, enabled=config.get("cuda_graphs", True))(step)
    draws = torch.Generator(device).manual_seed(config["seed"])
    for index in range(options["steps"]):
        if kind == "contrast":
            chosen, *others = contrast_batch(train, count, draws)
        else:
            chosen = torch.randint(len(pictures), (count,), generator=draws, device=device)
            hidden = torch.rand(count, encoder.num_patches, generator=draws, device=device)
            others = [(hidden < COVERED).float()]
        pixels = views(pictures[chosen], size, options["smallest_crop"], draws)
        rate = learning_rate(index, options["steps"], options["warmup_steps"])
        set_rate(optimizer, options["learning_rate"] * rate)
        (loss,) = learn(pixels.contiguous(memory_format=torch.channels_last), *others)
        average.update(module)
    Log(output / "pretrain.jsonl").write(stage=kind, step=index + 1, loss=round(float(loss), 4))
    save_state(output / "pretrain.safetensors", module, average, optimizer, {})


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
