"""Speak CompVis' single files: which networks stand in them, under which prefix, and what else."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PREFIXES", "UNET", "VAES", "family_of", "is_dropped"]

UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")

# Family → text encoder → its prefix.
PREFIXES: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}

# Known and not needed: averages kept for training, tables that follow from the betas, the loss of
# the autoencoder, marks of the program that wrote the file.
_DROPPED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "vae.loss.", "denoiser.", "loss.")
_DROPPED = frozenset(
    {
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "conditioner.embedders.0.logit_scale",
        "conditioner.embedders.0.text_projection",
        "epoch",
        "global_step",
        "log_one_minus_alphas_cumprod",
        "logvar",
        "lvlb_weights",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
        "scale_factor",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "v_pred",
        "ztsnr",
    }
)


def family_of(names: Iterable[str]) -> str | None:
    """Return the family whose text encoders are in the file, None where none are."""
    names = list(names)
    for family in ("sdxl", "sd2", "sd1"):
        prefixes = PREFIXES[family].values()
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            return family
    return None


def is_dropped(name: str) -> bool:
    """Tell whether a name that belongs to no network is known all the same."""
    return name in _DROPPED or name.startswith(_DROPPED_PREFIXES)
