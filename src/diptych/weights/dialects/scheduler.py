"""Speak diffusers' `scheduler_config.json`: betas, prediction type, spacing, and the sampler."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from diptych.errors import UnsupportedModel
from diptych.weights.fields import Field, check_fields

__all__ = ["check_config", "published_config", "read_config", "write_config"]

logger = logging.getLogger("diptych")

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_SPACINGS = ("leading", "trailing", "linspace")
_SCHEDULES = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}

# Class of theirs → sampler of ours. The second group is not built: the nearest stands in.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
_NEAREST = {
    "DDPMScheduler": "ddim",
    "DDPMParallelScheduler": "ddim",
    "TCDScheduler": "lcm",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "SASolverScheduler": "dpmpp_2m_sde",
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "euler_a",
}
_CLASSES = {
    **{sampler: name for name, sampler in reversed(_SAMPLERS.items())},
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "turbo": "EulerAncestralDiscreteScheduler",
}
_ALGORITHMS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}

# What a class of theirs takes where the file says nothing, if not what most take.
_USUAL: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "set_alpha_to_one": False,
    "final_sigmas_type": "zero",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "algorithm_type": "dpmsolver++",
    "clip_sample": False,
}
_SCALED = {"beta_start": 0.00085, "beta_end": 0.012}
_LCM = {**_SCALED, "beta_schedule": "scaled_linear", "set_alpha_to_one": True}
_UNUSUAL: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"set_alpha_to_one": True, "clip_sample": True},
    "DDIMParallelScheduler": {"set_alpha_to_one": True, "clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "DDPMParallelScheduler": {"clip_sample": True},
    "HeunDiscreteScheduler": _SCALED,
    "KDPM2DiscreteScheduler": _SCALED,
    "KDPM2AncestralDiscreteScheduler": _SCALED,
    "DPMSolverSDEScheduler": _SCALED,
    "UniPCMultistepScheduler": {"solver_type": "bh2"},
    "LCMScheduler": _LCM,
    "TCDScheduler": _LCM,
}

FIELDS = {
    "num_train_timesteps": Field("int", 1000, 1, 1_000_000),
    "beta_start": Field("float", 0.00085, 0, 1),
    "beta_end": Field("float", 0.012, 0, 1),
    "beta_schedule": Field("str", "scaled_linear", choices=_BETA_SCHEDULES),
    "trained_betas": Field("floats", None, 0, 1, is_optional=True, most=1_000_000),
    "prediction_type": Field("str", "epsilon", choices=_PREDICTIONS),
    "timestep_spacing": Field("str", None, choices=_SPACINGS, is_optional=True),
    "steps_offset": Field("int", 1, 0, 1000),
    "set_alpha_to_one": Field("bool", False),
    "rescale_betas_zero_snr": Field("bool", False),
    "schedule": Field(
        "str",
        "normal",
        choices=("normal", *_SCHEDULES.values(), "sgm_uniform", "simple", "kl_optimal"),
    ),
    "sampler": Field("str", "ddim", choices=(*dict.fromkeys(_SAMPLERS.values()), *_CLASSES)),
    "interpolation_type": Field("str", "linear", choices=("linear", "log_linear")),
    "final_sigmas_type": Field("str", "zero", choices=("zero", "sigma_min")),
    "solver_order": Field("int", 2, 1, 3),
    "solver_type": Field("str", "midpoint", choices=("midpoint", "heun", "bh1", "bh2", "logrho")),
    "lower_order_final": Field("bool", True),
    "euler_at_final": Field("bool", False),
    "original_inference_steps": Field("int", 50, 1, 1_000_000),
    "timestep_scaling": Field("float", 10.0, 0, 1e6),
    "clip_sample": Field("bool", False),
    "clip_sample_range": Field("float", 1.0, 0, 1e6),
}
# Said in the words of diffusers, each is a field of the same name.
_SHARED = tuple(name for name in FIELDS if name not in ("schedule", "sampler"))


def read_config(document: Mapping[str, Any], *, is_xl: bool) -> dict[str, Any]:
    """Translate a `scheduler_config.json` into the fields of `ScheduleConfig`.

    Raises `UnsupportedModel` for noise of another kind: flow matching, EDM.
    """
    name = document.get("_class_name", "DDIMScheduler")
    sampler = _sampler(name, document)
    _check_kind(name, document, is_xl=is_xl)
    given = {word: value for word, value in document.items() if value is not None}
    theirs = {**_USUAL, **_UNUSUAL.get(name, {}), **given}
    values = {word: theirs[word] for word in _SHARED if word in theirs}
    # Where the file leaves the spacing out, each sampler has its own habit, in diffusers too.
    values["timestep_spacing"] = given.get("timestep_spacing")
    if not is_xl:
        # The pipelines of SD 1 and 2 correct these on loading: files from before they were set.
        values["steps_offset"], values["clip_sample"] = 1, False
    flags = [schedule for flag, schedule in _SCHEDULES.items() if theirs.get(flag)]
    values["schedule"] = flags[0] if flags else "normal"
    values["sampler"] = sampler
    return check_config(values)


def write_config(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of `ScheduleConfig` into a `scheduler_config.json`."""
    values = check_config(schedule)
    name = _CLASSES[values["sampler"]]
    document: dict[str, Any] = {"_class_name": name}
    document |= {word: values[word] for word in _SHARED if values[word] is not None}
    if name == "DPMSolverMultistepScheduler":
        words = {sampler: algorithm for algorithm, sampler in _ALGORITHMS.items()}
        document["algorithm_type"] = words[values["sampler"]]
    if name == "PNDMScheduler":
        document["skip_prk_steps"] = True
    for flag, schedule_name in _SCHEDULES.items():
        if values["schedule"] == schedule_name:
            document[flag] = True
    unsaid = _UNSAID.get(name, set())
    return {
        word: list(value) if isinstance(value, tuple) else value
        for word, value in document.items()
        if word not in unsaid
    }


def published_config(family: str, prediction_type: str) -> dict[str, Any]:
    """Return what the family's original repository says, for files that say nothing."""
    sampler = {"sd1": "pndm", "sd2": "ddim", "sdxl": "euler"}[family]
    spacing = "leading" if family == "sdxl" else None
    values = {"sampler": sampler, "prediction_type": prediction_type, "timestep_spacing": spacing}
    return check_config(values)


def check_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ScheduleConfig`, every one there, else `UnsupportedModel`."""
    found = check_fields("scheduler", FIELDS, values)
    if found["solver_type"] == "logrho":  # DEIS, for which another stands in
        found["solver_type"] = "midpoint"
    betas = found["trained_betas"]
    if betas is not None and len(betas) != found["num_train_timesteps"]:
        raise UnsupportedModel(
            f"scheduler: {len(betas)} trained_betas for {found['num_train_timesteps']} timesteps"
        )
    return found


# Words that a class of theirs does not take, and warns about.
_SOLVER = {"solver_order", "solver_type", "lower_order_final", "euler_at_final"}
_LCM_WORDS = {"original_inference_steps", "timestep_scaling"}
_CLIP_WORDS = {"clip_sample", "clip_sample_range"}
_ALPHA_WORDS = {"interpolation_type", "final_sigmas_type", *_SOLVER}
_SIGMA_WORDS = {*_SOLVER, *_LCM_WORDS, "set_alpha_to_one"}
_UNSAID: Mapping[str, set[str]] = {
    "DDIMScheduler": _ALPHA_WORDS | _LCM_WORDS,
    "PNDMScheduler": _ALPHA_WORDS | _LCM_WORDS | _CLIP_WORDS | {"rescale_betas_zero_snr"},
    "LCMScheduler": _ALPHA_WORDS,
    "EulerDiscreteScheduler": _SIGMA_WORDS | _CLIP_WORDS,
    **{
        name: _SIGMA_WORDS | {"interpolation_type", "final_sigmas_type"} | others
        for name, others in (
            ("EulerAncestralDiscreteScheduler", _CLIP_WORDS),
            ("HeunDiscreteScheduler", {"rescale_betas_zero_snr"}),
            ("LMSDiscreteScheduler", {"rescale_betas_zero_snr", *_CLIP_WORDS}),
            ("DPMSolverSDEScheduler", {"rescale_betas_zero_snr", *_CLIP_WORDS}),
        )
    },
    "DPMSolverMultistepScheduler": _LCM_WORDS
    | _CLIP_WORDS
    | {"set_alpha_to_one", "interpolation_type"},
    "UniPCMultistepScheduler": _LCM_WORDS
    | _CLIP_WORDS
    | {"set_alpha_to_one", "interpolation_type", "euler_at_final"},
}


def _sampler(name: Any, document: Mapping[str, Any]) -> str:
    if not isinstance(name, str):
        raise UnsupportedModel(f"scheduler: its _class_name is {repr(name)[:60]}, not a name")
    if name in _NEAREST:
        sampler = _NEAREST[name]
        logger.warning("the scheduler names %s, which is not built: %s instead", name, sampler)
        return sampler
    if name not in _SAMPLERS:
        raise UnsupportedModel(
            f"scheduler: it is a {repr(name)[:60]}; diptych knows {', '.join(_SAMPLERS)}"
        )
    if name != "DPMSolverMultistepScheduler":
        return _SAMPLERS[name]
    algorithm = document.get("algorithm_type", "dpmsolver++")
    if algorithm not in _ALGORITHMS:
        logger.warning(
            "the scheduler's algorithm_type is %s: dpmpp_2m instead", repr(algorithm)[:40]
        )
    return _ALGORITHMS.get(algorithm, "dpmpp_2m")


# Words that are not built, and what they are where nobody asks for them.
_LEFT_OUT: Mapping[str, Any] = {
    "thresholding": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "predict_x0": True,
    "disable_corrector": [],
}


def _check_kind(name: Any, document: Mapping[str, Any], *, is_xl: bool) -> None:
    """Refuse what changes the noise and is not built; say what is left out."""
    if document.get("use_flow_sigmas"):
        raise UnsupportedModel("scheduler: it is for flow matching, which is not built")
    if document.get("timestep_type", "discrete") != "discrete":
        raise UnsupportedModel("scheduler: its timesteps are continuous, which is not built")
    for word in ("sigma_min", "sigma_max"):
        if document.get(word) is not None:
            raise UnsupportedModel(f"scheduler: {word} is set, which is not built")
    for word, usual in _LEFT_OUT.items():
        value = document.get(word, usual)
        if value not in (usual, None):
            logger.warning("%s: %s is %s, which is left out", name, word, repr(value)[:40])
    if name == "PNDMScheduler" and not document.get("skip_prk_steps"):
        logger.warning("%s: skip_prk_steps is not true, and its first steps are PLMS too", name)
    if name == "LCMScheduler" and is_xl and document.get("clip_sample"):
        logger.warning("%s: clip_sample is true, which is left out", name)
    if document.get("algorithm_type") == "sde-dpmsolver++" and document.get("solver_order") == 3:
        logger.warning("%s: solver_order is 3, which is built without noise only: 2 instead", name)
