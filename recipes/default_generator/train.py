"""Stage 4: text encoder and UNet learn to paint what a sentence says.

    python recipes/default_generator/train.py [config.toml]
    torchrun --nproc-per-node 2 recipes/default_generator/train.py     # one process a core

The pictures are encoded once (`latents.safetensors`). Loss: squared error of what the scheduler's
`prediction_type` names, weighted by min-SNR. Goes on from the last saved state; all chance follows
from the seed and the step. `[train] start` names a generator to begin from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import configs
from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.runtimes.on_torch_widened import multiplies
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.training.muon import Muon
from diptych.training.parallel import Workers
from diptych.training.replay import Replay, set_rate
from diptych.training.state import (
    Average,
    Log,
    Pace,
    learning_rate,
    load_state,
    read_average,
    save_state,
)
from diptych.weights.diffusion import resolve_generator
from diptych.weights.load_generator import load_generator
from growth import grow
from pictures import Captioned, photographs, scene_parts
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
    """Hold the latents of all domains, one after another, and the token ids of their captions."""

    latents: Tensor  # float16 [N, c, h, w], scaled
    input_ids: Tensor  # [N, captions, T]; who has fewer repeats them
    empty: Tensor  # [T], of the empty sentence
    domains: dict[str, range]  # each one's rows


def main() -> None:
    config = configs.asked()
    settings, output = config["train"], Path(config["output"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # of a GPU: tf32 where bfloat16 is not asked for
    torch.backends.cudnn.benchmark = True
    workers = Workers()
    encode_all(config, device, workers)
    # Not before: encoding draws an autoencoder, and a run that finds the latents there does not.
    torch.manual_seed(config["seed"])
    module = build(config).to(device)
    average = Average(module, settings["ema_decay"])
    optimizer = Muon(
        module.named_parameters(),
        torch.tensor(settings["learning_rate"], device=device),
        weight_decay=settings["weight_decay"],
        workers=workers,
    )
    state, log, first, spent = output / "train.safetensors", Log(output / "train.jsonl"), 0, 0.0
    if state.exists():
        progress = load_state(state, module, average, optimizer)
        first, spent = progress["step"], progress.get("spent", 0.0)
    elif begin(module, config):
        average = Average(module, settings["ema_decay"])
    data = read(config, device)
    abar = torch.from_numpy(NoiseSchedule(schedule_config(config)).alphas_cumprod).float()
    abar = abar.to(device)
    rows, saved = workers.share(settings["batch_size"]), time.time()
    pace = Pace(settings["steps"], settings.get("seconds"), spent)
    replay = Replay(device, enabled=config.get("cuda_graphs", True))
    learn = partial(learning, module, optimizer, workers, abar, config)
    both = {frozen: replay(partial(learn, frozen)) for frozen in (False, True)}
    sums, step = torch.zeros(2, BANDS, device=device), first
    while step < (total := pace.total(step)):
        share = learning_rate(step, total, settings["warmup_steps"])
        share = max(share, LOWEST_RATE if step > 999 else 0)
        set_rate(optimizer, settings["learning_rate"] * share)
        drawn = batch(data, settings, (config["seed"], step))
        latents, input_ids, timesteps, noise = (part[rows] for part in drawn)
        frozen = step >= settings["text_encoder_steps"]
        (losses,) = both[frozen](latents, input_ids, timesteps, noise)
        average.update(module)
        band = timesteps * BANDS // 1000
        sums[0].index_add_(0, band, losses.float())
        sums[1].index_add_(0, band, torch.ones_like(losses))
        step += 1
        if workers.leads and step % LOG_EVERY == 0:
            means = (sums[0] / sums[1].clamp(min=1)).tolist()
            log.write(
                step=step,
                loss=round(float(sums[0].sum() / sums[1].sum()), 4),
                bands=[round(m, 4) for m in means],
            )
            sums.zero_()
        if workers.leads and time.time() - saved > SAVE_EVERY_S:
            save_state(state, module, average, optimizer, {"step": step, "spent": pace.spent})
            saved = time.time()
    if workers.leads:
        save_state(state, module, average, optimizer, {"step": step, "spent": pace.spent})
    workers.close()


def learning(
    module: Painter,
    optimizer: Muon,
    workers: Workers,
    abar: Tensor,
    config: dict[str, Any],
    frozen: bool,
    *inputs: Tensor,
) -> tuple[Tensor, ...]:
    """Take one step; `inputs`, and what comes back, are those of `loss`."""
    optimizer.zero_grad(set_to_none=True)
    kind = abar.device.type
    # Without units for bfloat16 it would be slower than float32.
    narrow = kind == "cuda" or multiplies(torch.bfloat16)
    with torch.autocast(kind, torch.bfloat16, enabled=narrow):
        losses = loss(module, *inputs, abar, config, frozen=frozen)
    losses.mean().backward()
    workers.average(module.parameters())
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return (losses.detach(),)


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
    words.setdefault("transformer_layers_per_block", (1,) * levels)
    return UNetConfig(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        cross_attention_dim=config["text_encoder"]["hidden_size"],
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


def begin(module: Painter, config: dict[str, Any]) -> bool:
    """Load what the painter starts from: a checkpoint, else the text encoder of stage 3."""
    start = config["train"].get("start")
    if start:
        former = load_generator(resolve_generator(start), dtype="float32")
        module.text_encoder.load_state_dict(former["text_encoder"].state_dict())
        grow(module.unet, former["unet"].state_dict())
    elif (words := Path(config["output"]) / "words.safetensors").exists():
        module.text_encoder.load_state_dict(read_average(words))
    else:
        return False
    return True


def painted(config: dict[str, Any]) -> Painter:
    """Return the averaged weights of stage 4."""
    module = build(config)
    module.load_state_dict(read_average(Path(config["output"]) / "train.safetensors"))
    return module.eval()


# --- data -----------------------------------------------------------------------------------------


def encode_all(config: dict[str, Any], device: torch.device, workers: Workers) -> None:
    """Write scaled latents and captions of all training pictures, unless they are there.

    Latents are normalised channel by channel; `ship.py` folds their means and deviations into the
    autoencoder. One that a generator gave (`[train_vae] start`) speaks normalised latents already.
    """
    path = Path(config["output"]) / "latents.safetensors"
    if workers.leads and not path.exists():
        tensors, captions, threads = {}, {}, torch.get_num_threads()
        torch.set_num_threads(workers.count * threads)  # the others wait
        vae = trained(config, device)
        for name, parts in pictures(config).items():
            tensors[name], captions[name] = encode(vae, parts, device)
        everything = torch.cat([t[:3000] for t in tensors.values()])
        mean, std = everything.mean((0, 2, 3)), everything.std((0, 2, 3))
        if config["train_vae"].get("start"):
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
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


def pictures(config: dict[str, Any]) -> dict[str, Iterable[Captioned]]:
    """Return the training pictures of each domain, in parts."""
    flowers = photographs(Path(config["data"]), "flowers", "train")
    mirrored = np.concatenate([flowers.pictures, flowers.pictures[:, :, ::-1]])
    return {
        "scenes": scene_parts(config["train"]["scenes"], config["seed"]),
        "emoji": [photographs(Path(config["data"]), "emoji", "train")],
        "flowers": [Captioned(mirrored, flowers.captions * 2)],
    }


@torch.no_grad()
def encode(
    vae: nn.Module, parts: Iterable[Captioned], device: torch.device
) -> tuple[Tensor, list[list[str]]]:
    """Return the means of the latents [N, c, h, w], and the captions, of a domain."""
    found, captions = [], []
    for each in parts:
        for start in range(0, len(each), 250):
            mean, _ = vae.encode(to_pixels(each.pictures[start : start + 250], device))
            found.append(mean.cpu())
        captions += each.captions
    return torch.cat(found), captions


def read(config: dict[str, Any], device: torch.device) -> Encoded:
    """Return the training data, on the device."""
    tokenizer = load_tokenizer(config)
    latents, rows, domains = [], [], {}
    with safe_open(Path(config["output"]) / "latents.safetensors", "pt") as file:
        captions = json.loads(file.metadata()["captions"])
        most = config["train"].get("captions")  # of a picture; all, unless it says otherwise
        captions = {name: [few[:most] for few in each] for name, each in captions.items()}
        most = max(len(texts) for sentences in captions.values() for texts in sentences)
        for name, sentences in captions.items():
            domains[name] = range(len(rows), len(rows) + len(sentences))
            rows += [[texts[i % len(texts)] for i in range(most)] for texts in sentences]
            latents.append(file.get_tensor(name).to(device))
    known = {text: tokenizer.encode(text) for texts in rows for text in texts}
    input_ids = torch.tensor([[known[text] for text in texts] for texts in rows], device=device)
    empty = torch.tensor(tokenizer.encode(""), device=device)
    return Encoded(torch.cat(latents), input_ids, empty, domains)


def batch(
    data: Encoded, settings: dict[str, Any], seed: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents [B, c, h, w], token ids [B, T], timesteps [B] and noise [B, c, h, w]."""
    rng, size, mix = np.random.default_rng(seed), settings["batch_size"], settings["mix"]
    device = data.latents.device
    starts = np.array([data.domains[name].start for name in mix])
    counts = np.array([len(data.domains[name]) for name in mix])
    domain = rng.choice(len(mix), size, p=list(mix.values()))
    rows = starts[domain] + (rng.random(size) * counts[domain]).astype(np.int64)
    caption = rng.integers(data.input_ids.shape[1], size=size)
    dropped = rng.random(size) < settings["caption_dropout"]
    # One timestep from each of B equal parts: the mean over a batch is much steadier. Most are of
    # the middle, where it is decided what is where.
    parts = (rng.permutation(size) + rng.random(size)) / size
    low, high, share = settings["middle"]
    edge = (1 - share) / 2
    timesteps = np.interp(parts, [0, edge, 1 - edge, 1], [0, low, high, 1000])
    chosen, caption, dropped, timesteps = (
        torch.from_numpy(each).to(device) for each in (rows, caption, dropped, timesteps)
    )
    input_ids = torch.where(dropped[:, None], data.empty, data.input_ids[chosen, caption])
    latents = data.latents[chosen].float()
    chance = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(latents.shape, generator=chance, device=device)
    return latents, input_ids, timesteps.long().clamp(max=999), noise


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
    return weight * (found.float() - target).square().mean((1, 2, 3))


if __name__ == "__main__":
    main()
