"""Stage 1: teach the encoder to see, by naming the 200 classes of Tiny-ImageNet.

    python recipes/default_captioner/pretrain.py [config.toml]

Stop it at any time: it goes on from the last finished epoch.
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

from diptych.models.vit import ViT, ViTConfig
from diptych.training.replay import Replay, set_rate
from diptych.training.state import (
    Average,
    Log,
    Pace,
    decayed,
    learning_rate,
    load_state,
    save_state,
)
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
    options, output = config["pretrain"], Path(config["output"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config["seed"])
    torch.backends.cudnn.benchmark = True
    folder = Path(config["data"]) / "tiny_imagenet_64"
    train, val = tiny_imagenet(folder, "train"), tiny_imagenet(folder, "val")
    train = Labelled(train.pixels.to(device), train.labels.to(device))
    size, batch_size, epochs = (options[k] for k in ("image_size", "batch_size", "epochs"))

    model = Classifier(replace(encoder_config(config), image_size=size), 200)
    initialise(model)
    model.to(device, memory_format=torch.channels_last)
    average = Average(model, options["ema_decay"])
    optimizer = adamw(
        decayed(model.named_parameters(), options["weight_decay"]), device, (0.9, 0.999)
    )
    log, state = Log(output / "pretrain.jsonl"), output / "pretrain.safetensors"
    first, spent = 0, 0.0
    if state.exists():
        progress = load_state(state, model, average, optimizer)
        first, spent = progress["epoch"] + 1, progress.get("spent", 0.0)
    per_epoch = len(train.labels) // batch_size
    pace = Pace(epochs * per_epoch, options.get("seconds"), spent)

    smoothing = options["label_smoothing"]

    def step(pixels: Tensor, labels: Tensor, others: Tensor, stays: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            scores = model(pixels).float()
        loss = stays * F.cross_entropy(scores, labels, label_smoothing=smoothing)
        loss = loss + (1 - stays) * F.cross_entropy(scores, others, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return (loss.detach(),)

    learn = Replay(device, enabled=config.get("cuda_graphs", True))(step)
    over, epoch = pace.over(first * per_epoch), first - 1
    while not over:
        epoch += 1
        # All chance of an epoch follows from its number: a resumed run equals an unbroken one.
        chance = torch.Generator().manual_seed(config["seed"] * 1000 + epoch)
        draws = torch.Generator(device).manual_seed(config["seed"] * 1000 + epoch)
        torch.manual_seed(config["seed"] * 1000 + epoch)
        order, losses = torch.randperm(len(train.labels), generator=chance).to(device), []
        for index in range(per_epoch):
            chosen = order[index * batch_size : (index + 1) * batch_size]
            pixels = views(train.pixels[chosen], size, options["smallest_crop"], draws)
            # As later on, what their codec left must not be what they are known by.
            if kept := round(options["detailed"] * batch_size):
                others = pixels.roll(1, 0)[:kept]
                pixels = torch.cat([detailed(pixels[:kept], others, draws), pixels[kept:]])
            labels = others = train.labels[chosen]
            stays = 1.0
            if torch.rand(1, generator=chance).item() < options["cutmix"]:
                pixels, partner, stays = mixed(pixels, chance)
                others = labels[partner]
            done = epoch * per_epoch + index
            rate = learning_rate(done, pace.total(done), options["warmup_steps"])
            set_rate(optimizer, options["learning_rate"] * rate)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            (loss,) = learn(pixels, labels, others, torch.full((), stays, device=device))
            average.update(model)
            losses.append(loss.clone())
        over = pace.over((epoch + 1) * per_epoch)
        if not over and (epoch + 1) % options["validate_every"]:
            continue
        with average.swapped(model):
            right = accuracy(model, val, size, device)
        log.write(
            stage="pretrain",
            epoch=epoch,
            loss=round(float(sum(losses)) / len(losses), 4),
            val_accuracy_average=round(right, 4),
        )
        save_state(state, model, average, optimizer, {"epoch": epoch, "spent": pace.spent})


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
