"""Stage 4: text encoder and UNet learn to paint what a sentence says.

    python recipes/default_generator/train.py [config.toml]
    torchrun --nproc-per-node 2 recipes/default_generator/train.py     # one process a core

The pictures are encoded once (`latents.safetensors`). Loss: squared error of what the scheduler's
`prediction_type` names, weighted by min-SNR. Goes on from the last saved state; all chance follows
from the seed and the step.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.training.muon import Muon
from diptych.training.parallel import Workers
from diptych.training.state import (
    Average,
    Log,
    learning_rate,
    load_state,
    read_average,
    save_state,
)
from pictures import Captioned, photographs, scenes
from tokenizer import load as load_tokenizer
from train_vae import to_pixels, trained

SAVE_EVERY_S = 240.0
LOG_EVERY = 100
LOWEST_RATE = 0.03  # of the peak, where the cosine ends
BANDS = 4  # of timesteps, each with its own mean loss in the log


class Painter(nn.Module):
    """Hold what is trained together."""

    def __init__(self, config: dict[str, Any], vocab_size: int, eos_token_id: int) -> None:
        super().__init__()
        self.text_encoder = ClipText(text_config(config, vocab_size, eos_token_id))
        self.unet = UNet(unet_config(config))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold `latents` float16 [N, c, h, w] of one domain, scaled, and token ids of each caption."""

    latents: Tensor
    input_ids: list[Tensor]  # [captions, T] a picture


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("config.toml")
    config = tomllib.loads(path.read_text())
    settings, output = config["train"], Path(config["output"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = Workers()
    torch.manual_seed(config["seed"])
    encode_all(config, device, workers)
    module = build(config).to(device)
    average = Average(module, settings["ema_decay"])
    optimizer = Muon(
        module.named_parameters(),
        settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        workers=workers,
    )
    state, log, first = output / "train.safetensors", Log(output / "train.jsonl"), 0
    if state.exists():
        first = load_state(state, module, average, optimizer)["step"]
    elif (output / "words.safetensors").exists():
        module.text_encoder.load_state_dict(read_average(output / "words.safetensors"))
        average = Average(module, settings["ema_decay"])
    data, empty = read(config)
    abar = torch.from_numpy(NoiseSchedule(schedule_config(config)).alphas_cumprod).float()
    rows, total, saved = workers.share(settings["batch_size"]), settings["steps"], time.time()
    sums = torch.zeros(2, BANDS)
    for step in range(first, total):
        share = learning_rate(step, total, settings["warmup_steps"])
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * max(share, LOWEST_RATE if step > 999 else 0)
        latents, input_ids, timesteps, noise = (
            part[rows].to(device)
            for part in batch(data, empty, settings, np.random.default_rng((config["seed"], step)))
        )
        losses = loss(
            *(module, latents, input_ids, timesteps, noise, abar.to(device), config),
            frozen=step >= settings["text_encoder_steps"],
        )
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        workers.average(module.parameters())
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module)
        band = (timesteps.cpu() * BANDS // 1000).long()
        sums[0].index_add_(0, band, losses.detach().cpu())
        sums[1].index_add_(0, band, torch.ones(len(band)))
        if not workers.leads:
            continue
        if (step + 1) % LOG_EVERY == 0:
            means = (sums[0] / sums[1].clamp(min=1)).tolist()
            log.write(
                step=step + 1,
                loss=round(float(sums[0].sum() / sums[1].sum()), 4),
                bands=[round(m, 4) for m in means],
            )
            sums.zero_()
        if time.time() - saved > SAVE_EVERY_S or step + 1 == total:
            save_state(state, module, average, optimizer, {"step": step + 1})
            saved = time.time()
    workers.close()


# --- modules --------------------------------------------------------------------------------------


def text_config(config: dict[str, Any], vocab_size: int, eos_token_id: int) -> ClipTextConfig:
    return ClipTextConfig(
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        max_position_embeddings=config["tokenizer"]["model_max_length"],
        **config["text_encoder"],
    )


def unet_config(config: dict[str, Any]) -> UNetConfig:
    words = {name: tuple(v) if isinstance(v, list) else v for name, v in config["unet"].items()}
    latent_channels, levels = config["vae"]["latent_channels"], len(words["block_out_channels"])
    return UNetConfig(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        cross_attention_dim=config["text_encoder"]["hidden_size"],
        transformer_layers_per_block=(1,) * levels,
        **words,
    )


def schedule_config(config: dict[str, Any]) -> ScheduleConfig:
    return ScheduleConfig(**config["schedule"])


def build(config: dict[str, Any]) -> Painter:
    """Return text encoder and UNet with random weights."""
    tokenizer = load_tokenizer(config)
    module = Painter(config, tokenizer.vocab_size, tokenizer.eos_token_id)
    for name, parameter in module.text_encoder.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.02)
    for name, parameter in module.unet.named_parameters():
        if any(end in name for end in ("conv2.", "proj_out.", "conv_out.")):
            # Every block begins as nothing added (Dhariwal and Nichol 2021).
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return module


def painted(config: dict[str, Any]) -> Painter:
    """Return the averaged weights of stage 4."""
    module = build(config)
    module.load_state_dict(read_average(Path(config["output"]) / "train.safetensors"))
    return module.eval()


# --- data -----------------------------------------------------------------------------------------


def encode_all(config: dict[str, Any], device: torch.device, workers: Workers) -> None:
    """Write scaled latents and captions of all training pictures, unless they are there.

    Latents are normalised channel by channel; `normalise.json` keeps the means and deviations,
    which `ship.py` folds into the autoencoder.
    """
    path = Path(config["output"]) / "latents.safetensors"
    if workers.leads and not path.exists():
        tensors, captions, threads = {}, {}, torch.get_num_threads()
        torch.set_num_threads(workers.count * threads)  # the others wait
        vae = trained(config, device)
        for name, each in pictures(config).items():
            tensors[name] = _encode(vae, each, device)
            captions[name] = each.captions
        everything = torch.cat([t[:3000] for t in tensors.values()])
        mean, std = everything.mean((0, 2, 3)), everything.std((0, 2, 3))
        tensors = {
            name: ((t - mean[:, None, None]) / std[:, None, None]).half().contiguous()
            for name, t in tensors.items()
        }
        tensors |= {"mean": mean, "std": std}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"captions": json.dumps(captions)})
        partial.replace(path)
        torch.set_num_threads(threads)
    workers.wait()


def pictures(config: dict[str, Any]) -> dict[str, Captioned]:
    data, flowers = Path(config["data"]), None
    flowers = photographs(data, "flowers", "train")
    mirrored = np.concatenate([flowers.pictures, flowers.pictures[:, :, ::-1]])
    return {
        "scenes": scenes(config["train"]["scenes"], config["seed"]),
        "emoji": photographs(data, "emoji", "train"),
        "flowers": Captioned(mirrored, flowers.captions * 2),
    }


@torch.no_grad()
def _encode(vae: nn.Module, each: Captioned, device: torch.device) -> Tensor:
    found = []
    for start in range(0, len(each), 64):
        mean, _ = vae.encode(to_pixels(each.pictures[start : start + 64]).to(device))
        found.append(mean.cpu())
    return torch.cat(found)


def read(config: dict[str, Any]) -> tuple[dict[str, Encoded], Tensor]:
    """Return the data by domain, and the token ids of the empty sentence."""
    tokenizer = load_tokenizer(config)
    found = {}
    with safe_open(Path(config["output"]) / "latents.safetensors", "pt") as file:
        captions = json.loads(file.metadata()["captions"])
        for name, sentences in captions.items():
            ids = [torch.tensor([tokenizer.encode(text) for text in texts]) for texts in sentences]
            found[name] = Encoded(file.get_tensor(name), ids)
    return found, torch.tensor(tokenizer.encode(""))


def batch(
    data: dict[str, Encoded], empty: Tensor, settings: dict[str, Any], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents [B, c, h, w], token ids [B, T], timesteps [B] and noise [B, c, h, w]."""
    size, names = settings["batch_size"], list(settings["mix"])
    chosen = rng.choice(names, size, p=[settings["mix"][name] for name in names])
    latents, input_ids = [], []
    for name in chosen:
        index = rng.integers(len(data[name].latents))
        latents.append(data[name].latents[index].float())
        texts = data[name].input_ids[index]
        dropped = rng.random() < settings["caption_dropout"]
        input_ids.append(empty if dropped else texts[rng.integers(len(texts))])
    # One timestep from each of B equal parts: the mean over a batch is much steadier. Most are of
    # the middle, where it is decided what is where.
    parts = (rng.permutation(size) + rng.random(size)) / size
    low, high, share = settings["middle"]
    edge = (1 - share) / 2
    timesteps = np.interp(parts, [0, edge, 1 - edge, 1], [0, low, high, 1000])
    stacked = torch.stack(latents)
    noise = torch.from_numpy(rng.standard_normal(tuple(stacked.shape), np.float32))
    return stacked, torch.stack(input_ids), torch.from_numpy(timesteps).long().clamp(max=999), noise


# --- loss -----------------------------------------------------------------------------------------


def loss(
    module: Painter,
    latents: Tensor,
    input_ids: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    abar: Tensor,
    config: dict[str, Any],
    *,
    frozen: bool = False,
) -> Tensor:
    """Return the weighted loss of each row, [B] (min-SNR: Hang et al. 2023; v: Salimans 2022).

    For v the weight is min-SNR of `snr + 1`, the factor between the errors of v and of the sample:
    that of `snr` alone leaves nothing at high noise, where the layout is decided. `frozen` says
    that the text encoder learns no more.
    """
    signal = abar[timesteps].sqrt()[:, None, None, None]
    spread = (1 - abar[timesteps]).sqrt()[:, None, None, None]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        words, _ = module.text_encoder(input_ids)
    found = module.unet(signal * latents + spread * noise, timesteps.float(), words)
    snr = abar[timesteps] / (1 - abar[timesteps])
    gamma = config["train"]["snr_gamma"]
    if config["schedule"]["prediction_type"] == "v_prediction":
        target = signal * noise - spread * latents
        weight = (snr + 1).clamp(max=gamma + 1) / (snr + 1)
    else:
        target, weight = noise, snr.clamp(max=gamma) / snr
    return weight * (found - target).square().mean((1, 2, 3))


if __name__ == "__main__":
    main()
