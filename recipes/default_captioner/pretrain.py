"""Stage 1: teach the encoder to see, by naming the 200 classes of Tiny-ImageNet.

    python recipes/default_captioner/pretrain.py [config.toml]

Stop it at any time: it goes on from the last finished epoch.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.models.vit import ViT, ViTConfig
from diptych.training.replay import Replay
from diptych.training.state import decayed
from epochs import Epoch, Epochs
from pictures import Labelled, mixed, plain, tiny_imagenet, views
from things import detailed


class Classifier(nn.Module):
    """Name a picture from the mean of the encoder's tokens."""

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__()
        self.encoder = ViT(config)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(pixel_values).mean(1))
        return scores


def encoder_config(config: dict[str, Any]) -> ViTConfig:
    values = dict(config["encoder"])
    values["stem_channels"] = tuple(values["stem_channels"])
    return ViTConfig(patch_size=2 ** len(values["stem_channels"]), layer_norm_eps=1e-6, **values)


def initialise(module: nn.Module) -> None:
    """Start linear layers and embeddings small (BERT's 0.02) and convolutions by fan-out."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        # Residual blocks start as the identity (Goyal et al. 2017).
        if isinstance(part, nn.BatchNorm2d) and name.endswith("conv_2.1"):
            nn.init.zeros_(part.weight)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "position_embeddings")):
            nn.init.normal_(parameter, std=0.02)


def adamw(
    groups: list[dict[str, Any]], device: str, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return an optimizer whose learning rates and count of steps a recorded step can read."""
    # A tensor each: one given for all would be shared by the groups.
    groups = [{**group, "lr": torch.zeros((), device=device)} for group in groups]
    return torch.optim.AdamW(groups, betas=betas, fused=True, capturable=device == "cuda")


@torch.no_grad()
def accuracy(model: Classifier, data: Labelled, size: int, device: str) -> float:
    model.eval()
    right = 0
    for pixels, labels in zip(data.pixels.split(250), data.labels.split(250), strict=True):
        with torch.autocast(device, torch.bfloat16):
            scores = model(plain(pixels.to(device), size))
        right += int((scores.argmax(1).cpu() == labels).sum())
    model.train()
    return right / len(data.labels)


def main(config: dict[str, Any]) -> None:
    options = config["pretrain"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config["seed"])
    torch.backends.cudnn.benchmark = True
    folder = Path(config["data"]) / "tiny_imagenet_64"
    train, val = tiny_imagenet(folder, "train"), tiny_imagenet(folder, "val")
    train = Labelled(train.pixels.to(device), train.labels.to(device))
    size = options["image_size"]
    model = Classifier(replace(encoder_config(config), image_size=size), 200)
    initialise(model)
    model.to(device, memory_format=torch.channels_last)
    optimizer = adamw(
        decayed(model.named_parameters(), options["weight_decay"]), device, (0.9, 0.999)
    )
    epochs = Epochs("pretrain", config, model, optimizer, examples=len(train.labels))
    learn = Replay(device, enabled=config.get("cuda_graphs", True))(
        step_of(model, optimizer, options["label_smoothing"])
    )
    for epoch in epochs:
        order, losses = torch.randperm(len(train.labels), generator=epoch.chance).to(device), []
        for index in epochs.steps():
            chosen = order[index * options["batch_size"] :][: options["batch_size"]]
            (loss,) = learn(*seen(train, chosen, options, epoch))
            losses.append(loss.clone())
        if epochs.is_due():
            with epochs.average.swapped(model):
                right = accuracy(model, val, size, device)
            mean = float(sum(losses)) / len(losses)
            epochs.keep(loss=round(mean, 4), val_accuracy_average=round(right, 4))


def step_of(
    model: Classifier, optimizer: torch.optim.Optimizer, smoothing: float
) -> Callable[..., tuple[Tensor, ...]]:
    """Return a step of learning, which takes what `seen` gives and returns the loss."""

    def step(pixels: Tensor, labels: Tensor, others: Tensor, stays: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            scores = model(pixels).float()
        loss = stays * F.cross_entropy(scores, labels, label_smoothing=smoothing)
        loss = loss + (1 - stays) * F.cross_entropy(scores, others, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return (loss.detach(),)

    return step


def seen(
    data: Labelled, chosen: Tensor, options: dict[str, Any], epoch: Epoch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return views of the `chosen` pictures, their labels, others', and the share of their own."""
    size, count = options["image_size"], options["batch_size"]
    pixels = views(data.pixels[chosen], size, options["smallest_crop"], epoch.draws)
    # As later on, what their codec left must not be what they are known by.
    if kept := round(options["detailed"] * count):
        partners = pixels.roll(1, 0)[:kept]
        pixels = torch.cat([detailed(pixels[:kept], partners, epoch.draws), pixels[kept:]])
    labels = others = data.labels[chosen]
    stays = 1.0
    if torch.rand(1, generator=epoch.chance).item() < options["cutmix"]:
        pixels, partner, stays = mixed(pixels, epoch.chance)
        others = labels[partner]
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return pixels, labels, others, torch.full((), stays, device=pixels.device)


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
