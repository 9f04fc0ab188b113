"""Put diffusers' scheduler of one of our names into a pipeline, drawing the noise that we draw."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diptych.text_to_image.noise import NoiseSource

# Ours: the module and class in diffusers, and what has to be said to it.
SCHEDULERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Published files of both say clip_sample false; a swap from another scheduler loses that.
    "ddim": ("ddim", "DDIMScheduler", {"clip_sample": False}),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "dpmpp_sde": ("dpmsolver_sde", "DPMSolverSDEScheduler", {}),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}),
    "lcm": ("lcm", "LCMScheduler", {"clip_sample": False}),
    # As every published file says; without, it would begin with Runge-Kutta steps.
    "pndm": ("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
    "turbo": (
        "euler_ancestral_discrete",
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "trailing"},
    ),
}


def swap_scheduler(
    pipeline: Any, sampler: str, seeds: list[int], monkeypatch: pytest.MonkeyPatch, **config: Any
) -> None:
    """Give `pipeline` the scheduler that our `sampler` stands for, as diffusers' guide says."""
    module_name, class_name, needed = SCHEDULERS[sampler]
    if sampler == "dpmpp_sde" and importlib.util.find_spec("torchsde") is None:
        # Needed for its Brownian tree only, which is replaced below.
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{module_name}")
    scheduler = getattr(module, class_name).from_config(
        pipeline.scheduler.config, **{**needed, **config}
    )
    noise = NoiseSource(seeds)
    if sampler == "lms":
        monkeypatch.setattr(module, "integrate", SimpleNamespace(quad=_quad), raising=False)
    if sampler == "dpmpp_sde":
        scheduler = _with_brownian(scheduler, noise)
    elif hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: _drawn(noise, shape))
    monkeypatch.setattr(pipeline, "scheduler", scheduler)  # its own is back after the test


def _drawn(noise: NoiseSource, shape: Any) -> Any:
    import torch

    return torch.from_numpy(noise.draw(tuple(shape)[1:]))


def _with_brownian(scheduler: Any, noise: NoiseSource) -> Any:
    original = scheduler.set_timesteps
    shape: list[Any] = []

    def brownian() -> Callable[[Any, Any], Any]:
        memory: list[Any] = []

        def draw(sigma: Any, target: Any) -> Any:
            """Return the increment of a path: the whole step's is the half step's, walked on."""
            sigma, target = float(sigma), float(target)
            drawn = _drawn(noise, shape[0])
            if not memory:
                memory[:] = [sigma, target, drawn]
                return drawn
            start, middle, first = memory
            assert abs(sigma - start) < 1e-3 * sigma
            memory.clear()
            walked = first * math.sqrt(start - middle) + drawn * math.sqrt(middle - target)
            return walked / math.sqrt(start - target)

        return draw

    def set_timesteps(*args: Any, **words: Any) -> Any:
        made = original(*args, **words)
        scheduler.noise_sampler = brownian()
        return made

    plain_step = scheduler.step

    def step(model_output: Any, timestep: Any, sample: Any, **words: Any) -> Any:
        shape[:] = [sample.shape]
        return plain_step(model_output, timestep, sample, **words)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    return scheduler


def _quad(function: Callable[[float], float], a: Any, b: Any, **_: Any) -> tuple[float]:
    """Integrate by Gauss and Legendre, exact for the cubics of LMS; scipy is not needed for it."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (float(a) + float(b)) / 2, (float(b) - float(a)) / 2
    values = [float(function(middle + half * node)) for node in nodes]
    return (half * float(np.dot(weights, values)),)
