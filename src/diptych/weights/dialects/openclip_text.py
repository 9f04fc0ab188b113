"""Speak OpenCLIP's text towers, as they stand in the single files of Stable Diffusion 2 and XL."""

from __future__ import annotations

from diptych.weights.rename import Rules, Scheme

__all__ = ["DROPPED", "openclip_text"]

_BLOCK = "transformer.resblocks.{}"
_LAYER = "text_model.encoder.layers.{}"
_INNER = (
    ("ln_1", "layer_norm1"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
# Query, key and value in one, along the rows.
_FUSED = tuple(
    (f"attn.in_proj_{leaf}", tuple(f"self_attn.{to}_proj.{leaf}" for to in "qkv"))
    for leaf in ("weight", "bias")
)
_PATHS: Rules = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    *((f"{_BLOCK}.{file}", f"{_LAYER}.{module}") for file, module in _INNER),
    ("ln_final", "text_model.final_layer_norm"),
)
_TENSORS: Rules = (
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *(
        (f"{_BLOCK}.{file}", tuple(f"{_LAYER}.{module}" for module in modules))
        for file, modules in _FUSED
    ),
)
DROPPED = ("logit_scale", "attn_mask")


def openclip_text(*, has_projection: bool, unused_layer: int | None = None) -> Scheme:
    """Return the dialect of a tower; `unused_layer` stands in the file and is not run.

    Stable Diffusion 2 takes the words from the layer before the last, so ours ends there.
    """
    unused = f"transformer.resblocks.{unused_layer}"
    is_cut = unused_layer is not None
    return Scheme(
        NAME="OpenCLIP text",
        TELLTALE="transformer.resblocks.0.attn.in_proj_weight",
        RULES=(*_PATHS, *(((f"{unused}.{file}", None) for file, _ in _INNER) if is_cut else ())),
        TENSORS=(
            *_TENSORS,
            *(((f"{unused}.{file}", None) for file, _ in _FUSED) if is_cut else ()),
            ("text_projection", "text_projection.weight" if has_projection else None),
            *((name, None) for name in DROPPED),
        ),
        RESHAPE={"text_projection": "transpose"},
    )
