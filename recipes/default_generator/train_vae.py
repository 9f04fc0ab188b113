"""Stage 1: learn to squeeze pictures into latents, and back.

    python recipes/default_generator/train_vae.py [config.toml]
    torchrun --nproc-per-node 2 recipes/default_generator/train_vae.py     # one process a core

Random crops, so that one step sees many textures; no adversary: squared error with a share of
absolute error. Goes on from the last saved state; all chance follows from the seed and the step.
`[train_vae] start` names a generator to begin from; with `steps = 0` its autoencoder stays, and
with `learns = "decoder"` its encoder does, so that a painter's latents mean what they did. A share
`painted` of the pictures then comes back from latents as that generator's painter leaves them,
which are smoother than those of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import configs
from diptych.models.vae import Vae, VaeConfig
from diptych.runtimes.on_torch_widened import multiplies
from diptych.text_to_image.denoiser import EpsDenoiser
from diptych.text_to_image.schedules import NoiseSchedule, ScheduleConfig
from diptych.training.parallel import Workers
from diptych.training.state import (
    Average,
    Log,
    Pace,
    decayed,
    learning_rate,
    load_state,
    read_average,
    save_state,
)
from diptych.weights.diffusion import resolve_generator
from diptych.weights.load_generator import load_generator
from pictures import Captioned, photographs, scenes

Pictures = NDArray[np.uint8]
Repaint = Callable[[Tensor, torch.Generator], Tensor]
SAVE_EVERY = 200
FLAT = 0.02  # of -1 to 1: the span of a neighbourhood of 9 x 9 pixels that counts as flat


def main() -> None:
    config = configs.asked()
    settings, output = {**config["vae"], **config["train_vae"]}, Path(config["output"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # of a GPU: tf32 where bfloat16 is not asked for
    torch.backends.cudnn.benchmark = True
    workers = Workers()
    torch.manual_seed(config["seed"])
    module = build(config).to(device)
    average = Average(module, settings["ema_decay"])
    optimizer = torch.optim.AdamW(
        decayed(module.named_parameters(), settings["weight_decay"]),
        lr=settings["learning_rate"],
        betas=(0.9, 0.99),
    )
    state, log, first, spent = output / "vae.safetensors", Log(output / "vae.jsonl"), 0, 0.0
    if state.exists():
        progress = load_state(state, module, average, optimizer)
        first, spent = progress["step"], progress.get("spent", 0.0)
    elif begin(module, config):
        average = Average(module, settings["ema_decay"])
    if settings.get("learns", "all") == "decoder":
        module.encoder.requires_grad_(False)
        if module.quant_conv is not None:
            module.quant_conv.requires_grad_(False)
    data, former, repaint = read(config), formerly(config, device), repainting(config, device)
    rows = workers.share(settings["batch_size"])
    pace, step = Pace(settings["steps"], settings.get("seconds"), spent), first
    sums: dict[str, Tensor] = {}
    while step < (total := pace.total(step)):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * learning_rate(
                step, total, settings["warmup_steps"]
            )
        pictures = batch(data, settings, np.random.default_rng((config["seed"], step)))
        chance = torch.Generator(device).manual_seed(config["seed"] * 10**7 + step)
        pixels = to_pixels(pictures[rows], device)
        # Without units for bfloat16 it would be slower than float32.
        narrow = device.type == "cuda" or multiplies(torch.bfloat16)
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            losses = loss(module, pixels, chance, settings, former, repaint)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        workers.average(module.parameters())
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module)
        sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        step += 1
        if workers.leads and step % SAVE_EVERY == 0:
            means = {name: round(float(value) / SAVE_EVERY, 5) for name, value in sums.items()}
            log.write(step=step, **means)
            sums = {}  # what the first process saw
            save_state(state, module, average, optimizer, {"step": step, "spent": pace.spent})
    if workers.leads:
        save_state(state, module, average, optimizer, {"step": step, "spent": pace.spent})
        log.write(step=step, **validate(config, device))
    workers.close()


def build(config: dict[str, Any], **changes: Any) -> Vae:
    """Return the autoencoder of a config, with random weights."""
    words = {**config["vae"], **changes}
    words["block_out_channels"] = tuple(words["block_out_channels"])
    module = Vae(VaeConfig(**words))
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4:
            # Keep the variance, and let every residual block begin as almost nothing: a narrow
            # network of torch's default start stays on a plateau for hundreds of steps.
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
            parameter.data.mul_(0.2 if "conv2" in name else 1.0)
    if module.refine is not None:
        nn.init.zeros_(module.refine.conv_out.weight)  # begins as nothing added
        nn.init.zeros_(cast(Tensor, module.refine.conv_out.bias))
    return module


def begin(module: Vae, config: dict[str, Any]) -> bool:
    """Load the autoencoder of the generator that `start` names; tell whether it names one.

    What it does not have, `[vae] refine_channels`, stays as it is.
    """
    start = config["train_vae"].get("start")
    if start:
        former = load_generator(resolve_generator(start), dtype="float32")["vae"].state_dict()
        own = module.state_dict()
        for name, value in former.items():
            own[name][: len(value)] = value  # the last convolution gives the colours first
    return bool(start)


def trained(config: dict[str, Any], device: torch.device) -> Vae:
    """Return the autoencoder with the averaged weights of stage 1."""
    module = build(config)
    module.load_state_dict(read_average(Path(config["output"]) / "vae.safetensors"))
    return module.eval().to(device)


def read(config: dict[str, Any]) -> dict[str, Pictures]:
    data = Path(config["data"])
    found = {name: photographs(data, name, "train") for name in ("emoji", "flowers")}
    found["scenes"] = scenes(config["train_vae"].get("scenes", 3000), config["seed"])
    return {name: each.pictures for name, each in found.items()}


def batch(
    data: dict[str, Pictures], settings: dict[str, Any], rng: np.random.Generator
) -> Pictures:
    """Cut random crops, some mirrored; uint8 [B, crop, crop, 3]."""
    side, names = settings["crop"], list(settings["mix"])
    chosen = rng.choice(names, settings["batch_size"], p=[settings["mix"][n] for n in names])
    crops = []
    for name in chosen:
        picture = data[name][rng.integers(len(data[name]))]
        top, left = rng.integers(0, picture.shape[0] - side + 1, 2)
        crop = picture[top : top + side, left : left + side]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops)


def to_pixels(pictures: Pictures, device: torch.device) -> Tensor:
    """Turn uint8 [B, H, W, 3] into float [B, 3, H, W] in [-1, 1], on the device."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def formerly(config: dict[str, Any], device: torch.device) -> Vae | None:
    """Load the autoencoder whose latents the new ones should resemble, if one is named."""
    settings = config["train_vae"]
    if "former" not in settings:
        return None
    module = load_generator(resolve_generator(settings["former"]), device=device, dtype="float32")
    return cast(Vae, module["vae"].requires_grad_(False))


def repainting(config: dict[str, Any], device: torch.device) -> Repaint | None:
    """Return what puts latents behind a little noise and lets the painter of `start` find them.

    It is the end of its way to a picture in one step, without a sentence (`painted_until`: above
    the highest of the timesteps). None if no latents are to be `painted`.
    """
    settings = config["train_vae"]
    if not settings.get("painted"):
        return None
    model = resolve_generator(settings["start"])
    networks = load_generator(model, device=device, dtype="float32", only={"text_encoder", "unet"})
    unet = networks["unet"].requires_grad_(False)
    schedule = NoiseSchedule(ScheduleConfig(**model.schedule))
    steps = schedule.steps("euler", 1)  # any: they tell the timestep of every sigma
    ids = torch.tensor([model.tokenizers["tokenizer"].open().encode("")], device=device)
    with torch.no_grad():
        words = networks["text_encoder"](ids)[0]

    def predict(latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> list[Tensor]:
        return [unet(latents, timestep, encoder_hidden_states.expand(len(latents), -1, -1))]

    told = {"encoder_hidden_states": words}
    denoise = EpsDenoiser(predict, steps, told, schedule.config.prediction_type)

    @torch.no_grad()
    def repaint(latents: Tensor, chance: torch.Generator) -> Tensor:
        at = torch.randint(settings["painted_until"], (), generator=chance, device=device)
        sigma = float(schedule.sigmas[int(at)])
        noise = torch.randn(latents.shape, generator=chance, device=device)
        return cast(Tensor, denoise(latents.float() + sigma * noise, sigma))

    return repaint


def loss(
    module: Vae,
    pixels: Tensor,
    chance: torch.Generator,
    settings: dict[str, Any],
    former: Vae | None = None,
    repaint: Repaint | None = None,
) -> dict[str, Tensor]:
    """Return the loss of a batch and its parts.

    With a `former` autoencoder the latents are drawn to its own, so that a painter of the former
    ones paints the new ones after a short time. `repaint` changes the latents of the first rows.
    """
    mean, log_variance = module.encode(pixels)
    noise = torch.randn(mean.shape, generator=chance, device=mean.device)
    latents = mean + (0.5 * log_variance).exp() * noise
    if repaint is not None:
        count = round(settings["painted"] * len(mean))
        latents = torch.cat([repaint(mean[:count], chance), latents[count:]])
    decoded = module.decode(latents).float()
    difference, mean, log_variance = decoded - pixels, mean.float(), log_variance.float()
    squared, absolute = difference.square().mean(), difference.abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    total = squared + settings["absolute_weight"] * absolute + settings["kl_weight"] * divergence
    parts = {"squared": squared, "divergence": divergence}
    if former is not None:
        parts["moved"] = (mean - former.encode(pixels)[0].float()).square().mean()
        total = total + settings["former_weight"] * parts["moved"]
    return {"loss": total, **{name: part.detach() for name, part in parts.items()}}


@torch.no_grad()
def validate(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Measure PSNR of held-out pictures, dB, mean over pictures; spread of latents; flat parts."""
    module, found, spread, rough = trained(config, device), {}, [], []
    data = Path(config["data"])
    held_out: dict[str, Captioned] = {n: photographs(data, n, "val") for n in ("emoji", "flowers")}
    held_out["scenes"] = scenes(100, config["seed"] + 1)
    for name, each in held_out.items():
        ratios = []
        for start in range(0, len(each), 32):
            pixels = to_pixels(each.pictures[start : start + 32], device)
            mean, _ = module.encode(pixels)
            made = module.decode(mean).clamp(-1, 1)
            error = (made - pixels).square().mean((1, 2, 3))
            rough += roughness(made, pixels).tolist()
            ratios += (10 * torch.log10(4 / error)).tolist()
            spread.append(mean.flatten(1).std(1).mean().item())
        found[f"psnr_{name}"] = round(float(np.mean(ratios)), 2)
    seen = {"latent_std": np.mean(spread), "rough": np.nanmean(rough)}
    return {**found, **{name: round(float(value), 4) for name, value in seen.items()}}


def roughness(made: Tensor, pixels: Tensor) -> Tensor:
    """Return the root mean square error of each picture where it is flat, in levels of 0 to 255.

    A mesh of the patches shows there first. Steps between patches are no measure of it: emoji are
    drawn on a grid, photos were JPEGs, and originals have more of such steps than what comes back.
    """
    spans = [F.max_pool2d(sign * pixels, 9, 1, 4) for sign in (1, -1)]
    flat = (spans[0] + spans[1]).amax(1, keepdim=True) < FLAT
    errors = ((made - pixels).square().mean(1, keepdim=True) * flat).sum((1, 2, 3))
    return (errors / flat.sum((1, 2, 3))).sqrt() * 127.5


if __name__ == "__main__":
    main()
