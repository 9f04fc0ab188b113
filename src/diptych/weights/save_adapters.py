"""Write what changes a generator: low-rank updates as PEFT and kohya name them, learned words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diptych.errors import BadInput
from diptych.models.lora import LowRank
from diptych.weights.save_module import staged, write_file

__all__ = ["save_embedding", "save_lora"]

LAYOUTS = ("peft", "kohya")
# diffusers knows these two of SDXL, among layers of kohya's, by the name they have in sgm.
_SGM = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def save_lora(
    updates: Mapping[tuple[str, str], LowRank],
    path: str | Path,
    *,
    layout: str = "peft",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `updates`, by network and path of the layer, as one .safetensors.

    `layout` "peft" is what diffusers writes (`unet.….lora_A.weight`), "kohya" what sd-scripts does
    (`lora_unet_….lora_down.weight` with its alpha). An alpha other than the rank is multiplied into
    the second matrix, so that a reader who knows of none is right too. `dtype` is how the numbers
    are stored.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"layout is {layout!r}: give {' or '.join(LAYOUTS)}")
    is_xl = any(network == "text_encoder_2" for network, _ in updates)
    tensors: dict[str, Tensor] = {}
    for (network, layer), update in updates.items():
        down, up = update.down.detach().float(), update.up.detach().float() * update.scale
        if layout == "peft":
            base = f"{network}.{layer}"
            tensors |= {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
            continue
        prefix = "lora_te1" if is_xl and network == "text_encoder" else _KOHYA[network]
        base = f"{prefix}_{_SGM.get(layer, layer).replace('.', '_')}"
        tensors |= {
            f"{base}.lora_down.weight": down,
            f"{base}.lora_up.weight": up,
            f"{base}.alpha": torch.tensor(float(down.shape[0])),
        }
    _write(Path(path), {name: tensor.to(dtype) for name, tensor in tensors.items()})


def save_embedding(vectors: Mapping[str, Tensor], token: str, path: str | Path) -> None:
    """Write a learned word: its `vectors` [n, D] of each text encoder.

    One encoder's stand under the word itself, as diffusers writes them; two as `clip_l` and
    `clip_g`, as files for SDXL have them.
    """
    if len(vectors) == 1:
        (tensor,) = vectors.values()
        _write(Path(path), {token: tensor.detach().float()})
        return
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    _write(Path(path), {names[name]: each.detach().float() for name, each in vectors.items()})


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    packed = {name: tensor.cpu().contiguous() for name, tensor in sorted(tensors.items())}
    try:
        with staged(path.parent) as staging:
            write_file(staging / path.name, save(packed, {"format": "pt"}))
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written: {error.strerror or error}. Make room, or give another "
            "folder."
        ) from error
