"""Compare two openings of one generator by the pictures they make, and tensor by tensor.

Both draw pictures from the same words and the same noise, in a few steps of DDIM. What decides is
how far apart the pictures are, as peak signal-to-noise ratio: above 40 dB nobody sees a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.runtimes.network import OpenNetworks, check_wanted

__all__ = [
    "Sketch",
    "Words",
    "compare_generators",
    "compare_pictures",
    "denoised",
    "draw",
    "sketch_for",
    "sketch_of",
]

Array = Any
Floats = NDArray[np.float32]
Sketch = dict[str, Any]
"""What pictures are drawn from: `input_ids` [B + 1, T] by text encoder, the last row being the
empty prompt, `latents` [B, c, h, w], `time_ids` [1, 6], `steps` and `guidance_scale`."""

Words = Mapping[str, NDArray[np.int64]]
"""Token ids [B + 1, T] by text encoder; the last row is the empty prompt."""

_LARGEST = 32  # latents along an edge


def sketch_for(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    pictures: int = 2,
    steps: int = 6,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> Sketch:
    """Return seeded words and noise for the networks of `configs`."""
    random = np.random.default_rng(seed)
    words = {
        name: _words(config, pictures, random)
        for name, config in configs.items()
        if name.startswith("text_encoder")
    }
    edge = min(int(configs["unet"]["sample_size"]), _LARGEST)
    return sketch_of(words, configs, edge, random, steps=steps, guidance_scale=guidance_scale)


def sketch_of(
    words: Words,
    configs: Mapping[str, Mapping[str, Any]],
    edge: int,
    random: np.random.Generator,
    *,
    steps: int,
    guidance_scale: float,
) -> Sketch:
    """Return the sketch of `words`, `edge` latents wide and high."""
    rows = len(next(iter(words.values()))) - 1
    shape = (rows, int(configs["vae"]["latent_channels"]), edge, edge)
    pixels = edge * _downsampling(configs["vae"])
    return {
        "input_ids": dict(words),
        "latents": random.standard_normal(shape).astype(np.float32),
        "time_ids": np.array([[pixels, pixels, 0, 0, pixels, pixels]], np.float32),
        "steps": steps,
        "guidance_scale": guidance_scale,
    }


def draw(
    networks: OpenNetworks,
    configs: Mapping[str, Mapping[str, Any]],
    schedule: Mapping[str, Any],
    sketch: Sketch,
) -> Floats:
    """Draw the pictures of `sketch`, [B, 3, H, W] in [0, 1]."""
    latents = denoised(networks, configs["unet"], schedule, sketch)
    scaled = latents / configs["vae"]["scaling_factor"] + configs["vae"].get("shift_factor", 0.0)
    pixels = networks.numpy(networks["vae_decoder"](latents=scaled)[0])
    return ((pixels.clip(-1, 1) + 1) / 2).astype(np.float32, copy=False)


def denoised(
    networks: OpenNetworks,
    unet: Mapping[str, Any],
    schedule: Mapping[str, Any],
    sketch: Sketch,
    feeds: list[dict[str, NDArray[Any]]] | None = None,
) -> Array:
    """Take the noise of `sketch` away by DDIM (Song et al. 2021); `unet` is its config.

    What the UNet is given at each step is appended to `feeds`.
    """
    array, latents = networks.array, networks.array(sketch["latents"])
    alphas = _alphas(schedule)
    inputs = _conditioning(networks, unet, sketch)
    rows = len(sketch["latents"])
    noise_channels = int(unet["in_channels"]) - latents.shape[1]
    steps = [round(step) for step in np.linspace(len(alphas) - 1, 0, sketch["steps"])]
    for step, following in zip(steps, [*steps[1:], -1], strict=True):
        alpha, after = alphas[step], alphas[following] if following >= 0 else 1.0
        given = networks.numpy(latents)
        if noise_channels > 0:  # an inpainting UNet also sees a mask and a picture
            mask = np.ones((rows, noise_channels, *given.shape[2:]), np.float32)
            given = np.concatenate([given, mask], axis=1)
        own = {"latents": np.concatenate([given, given])}
        own["timestep"] = np.full(2 * rows, step, np.float32)
        if feeds is not None:
            feeds.append({**own, **{name: networks.numpy(each) for name, each in inputs.items()}})
        arrays = {name: array(each) for name, each in own.items()}
        made = networks["unet"](**arrays, **inputs)[0]
        kind = schedule.get("prediction_type", "epsilon")
        guess = made[rows:] + (made[:rows] - made[rows:]) * sketch["guidance_scale"]
        clean, noise = _split(kind, latents, guess, alpha)
        latents = clean * math.sqrt(after) + noise * math.sqrt(1 - after)
    return latents


def compare_pictures(expected: Floats, found: Floats) -> dict[str, Any]:
    """Return the peak signal-to-noise ratio of each pair, in dB; 200 for equal ones.

    0 where one of the two holds what is no number.
    """
    errors = ((expected.astype(np.float64) - found) ** 2).mean((1, 2, 3))
    errors = np.where(np.isfinite(errors), errors, 1.0)
    ratios = [200.0 if error < 1e-20 else 10 * math.log10(1 / error) for error in errors]
    return {
        "pictures": len(expected),
        "psnr_db": [round(ratio, 2) for ratio in ratios],
        "worst_psnr_db": round(min(ratios), 2),
    }


def compare_generators(
    expected: OpenNetworks,
    found: OpenNetworks,
    configs: Mapping[str, Mapping[str, Any]],
    sketch: Sketch,
    seed: int = 1,
) -> dict[str, dict[str, float]]:
    """Return the largest absolute difference of every output, by network."""
    worst: dict[str, dict[str, float]] = {}
    for name, arrays in _inputs(expected, configs, sketch, seed).items():
        names = check_wanted(None, expected[name].outputs)
        sides = []
        for networks in (expected, found):
            given = {
                key: each if isinstance(each, int) else networks.array(each)
                for key, each in arrays.items()
            }
            sides.append([networks.numpy(each) for each in networks[name](**given)])
        worst[name] = {
            output: float(np.abs(one - other).max())
            for output, one, other in zip(names, *sides, strict=True)
        }
    return worst


def _inputs(
    networks: OpenNetworks,
    configs: Mapping[str, Mapping[str, Any]],
    sketch: Sketch,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return an input for every network; edges are odd, and the three sizes of a batch differ."""
    random = np.random.default_rng(seed)
    inputs: dict[str, dict[str, Any]] = {
        name: {"input_ids": ids, "clip_skip": 0} for name, ids in sketch["input_ids"].items()
    }
    unet, vae = configs["unet"], configs["vae"]
    high, wide = 9, 13
    scale = vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)
    sizes = {
        "latents": (2, unet["in_channels"], high, wide),
        "encoder_hidden_states": (2, 7, unet["cross_attention_dim"]),
        "timestep_cond": (2, unet.get("time_cond_proj_dim") or 0),
    }
    if unet.get("addition_time_embed_dim"):
        total = unet["projection_class_embeddings_input_dim"]
        sizes["text_embeds"] = (2, total - 6 * unet["addition_time_embed_dim"])
    given = {name: random.standard_normal(size) for name, size in sizes.items()}
    given["timestep"] = np.array([3.0, 750.0])
    given["time_ids"] = sketch["time_ids"].repeat(2, axis=0)
    given["deep_features"] = random.standard_normal((2, unet["block_out_channels"][0], high, wide))
    for name in ("unet", "unet_shallow"):
        if name in networks:
            inputs[name] = {each: given[each] for each in networks[name].inputs}
    pixels = random.uniform(-1, 1, (1, vae["in_channels"], high * scale, wide * scale))
    inputs["vae_encoder"] = {"pixel_values": pixels}
    latents = random.standard_normal((1, vae["latent_channels"], high, wide))
    inputs["vae_decoder"] = {"latents": latents / vae["scaling_factor"]}
    return inputs


def _downsampling(vae: Mapping[str, Any]) -> int:
    """Count the pixels along an edge that become one latent, as `VaeConfig.downsampling`."""
    return int(vae.get("patch_size", 1)) * int(2 ** (len(vae["block_out_channels"]) - 1))


def _words(config: Mapping[str, Any], rows: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return [rows + 1, T] token ids: a few words and the end; the last row only ends."""
    length = int(config["max_position_embeddings"])
    end = min(int(config["eos_token_id"]), int(config["vocab_size"]) - 1)
    end = end if end > 2 else int(config["vocab_size"]) - 1
    words = np.full((rows + 1, length), end, np.int64)
    for row in range(rows):
        count = min(4 + 3 * row, length - 1)
        words[row, :count] = random.integers(0, end, count)
    return words


def _conditioning(
    networks: OpenNetworks, unet: Mapping[str, Any], sketch: Sketch
) -> dict[str, Any]:
    """Encode the words of `sketch` for the UNet; the empty prompt follows, row by row."""
    rows = len(sketch["latents"])
    order = [*range(rows), *[rows] * rows]
    states, pooled = [], None
    for name, ids in sketch["input_ids"].items():
        made, pooled = networks[name](input_ids=networks.array(ids), clip_skip=0)
        states.append(networks.numpy(made)[order])
    inputs: dict[str, Any] = {"encoder_hidden_states": np.concatenate(states, axis=-1)}
    if "text_embeds" in networks["unet"].inputs:
        inputs["text_embeds"] = networks.numpy(pooled)[order]
        inputs["time_ids"] = sketch["time_ids"].repeat(2 * rows, axis=0)
    if "timestep_cond" in networks["unet"].inputs:
        inputs["timestep_cond"] = np.zeros((2 * rows, unet["time_cond_proj_dim"]), np.float32)
    return {name: networks.array(each) for name, each in inputs.items()}


def _split(kind: str, latents: Any, guess: Any, alpha: float) -> tuple[Any, Any]:
    """Return what `guess` says of the picture and of the noise in `latents`."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "v_prediction":
        return latents * signal - guess * noise, latents * noise + guess * signal
    if kind == "sample":
        return guess, (latents - guess * signal) / max(noise, 1e-4)
    return (latents - guess * noise) / max(signal, 1e-4), guess


def _alphas(schedule: Mapping[str, Any]) -> Sequence[float]:
    """Return how much of the picture is left at each step, cumulated."""
    count = int(schedule.get("num_train_timesteps", 1000))
    first, last = schedule.get("beta_start", 0.00085), schedule.get("beta_end", 0.012)
    kind = schedule.get("beta_schedule", "scaled_linear")
    if schedule.get("trained_betas"):
        betas = np.asarray(schedule["trained_betas"], np.float64)
    elif kind == "squaredcos_cap_v2":
        left = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - left[1:] / left[:-1], 0.999)
    elif kind == "linear":
        betas = np.linspace(first, last, count)
    else:
        betas = np.linspace(first**0.5, last**0.5, count) ** 2
    cumulated: list[float] = np.cumprod(1 - betas).tolist()
    return cumulated
