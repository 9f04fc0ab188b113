"""Read files that change a generator: low-rank updates (LoRA) and learned words.

Both are put into PyTorch modules that are already filled, and leave them as they were.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import BadInput, UnsupportedModel, WeightsMismatch
from diptych.inputs import at_home
from diptych.weights.dialects.lora import UNSUPPORTED, Found, Place, Unplaced, find_places
from diptych.weights.files import read_checkpoint
from diptych.weights.pickles import read_embedding_pickle
from diptych.weights.tensors import StoredTensor, read_into

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diptych.models.lora import Layer, LowRank

__all__ = [
    "EmbeddingHandle",
    "LoraHandle",
    "add_embedding",
    "apply_lora",
    "merge_lora",
    "read_embedding",
    "read_lora",
]

_LORA_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_EMBEDDING_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
_SHOWN = 5
_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_numbers = count()
_FLOATS = ("float16", "bfloat16", "float32", "float64")

# --- low-rank updates -----------------------------------------------------------------------------


@dataclass(eq=False)
class LoraHandle:
    """Hold what a file changed, until `remove`."""

    path: Path
    scale: float
    fused: bool
    updates: list[tuple[Layer, LowRank, float]] = field(repr=False)  # and alpha / rank
    number: int = field(default_factory=_numbers.__next__, repr=False)  # no other one has it

    def set_scale(self, scale: float) -> None:
        """Make the file count `scale` times from here on; 1 is what it was trained for."""
        from diptych.models.lora import refresh

        self.scale = _checked_scale(scale)
        for _, update, strength in self.updates:
            update.scale = self.scale * strength
        if self.fused:
            refresh(layer for layer, _, _ in self.updates)

    def remove(self) -> None:
        """Leave every weight as it was before, to the bit; a second time changes nothing."""
        from diptych.models.lora import detach

        while self.updates:
            layer, update, _ = self.updates.pop()
            detach(layer, update)


def apply_lora(
    modules: Mapping[str, nn.Module], path: str | Path, scale: float = 1.0, fused: bool = False
) -> LoraHandle:
    """Put the LoRA in the file or folder `path` into the `modules` of a generator.

    Live it runs beside the layers; `fused` it is added to their weights, and those are kept as
    they were besides. Several add up. Raises `WeightsMismatch` where a tensor of the file has no
    place, naming the first five, and changes nothing then; `UnsupportedModel` for a LyCORIS of
    another kind.
    """
    from diptych.models import lora

    scale = _checked_scale(scale)
    path = _file(path, _LORA_FILES, "LoRA")
    made = read_lora(modules, path, scale)
    for layer, update, _ in made:
        lora.attach(layer, update, fused=fused)
    return LoraHandle(path, scale, fused, made)


def merge_lora(modules: Mapping[str, nn.Module], path: Path) -> None:
    """Add the LoRA in the file `path` to the weights of `modules`, for good; see `apply_lora`."""
    for layer, update, _ in read_lora(modules, path):
        whole = layer.weight.data.float() + update.to(layer.weight.device).delta()
        layer.weight.data = whole.to(layer.weight.dtype)


def read_lora(
    modules: Mapping[str, nn.Module], path: Path, scale: float = 1.0
) -> list[tuple[Layer, LowRank, float]]:
    """Read a file of LoRA; return each layer with its update, and alpha / rank."""
    from diptych.models import lora

    stored = read_checkpoint([path])
    layers = {name: lora.layers(modules[name]) for name in _NETWORKS if name in modules}
    config = getattr(modules.get("unet"), "config", None)
    places = _places(path, stored, layers, None if config is None else dataclasses.asdict(config))
    alphas = _Alphas(path)
    made = []
    for place, found in places.items():
        layer = layers[place[0]][place[1]]
        down, up = _matrices(path, stored, found, layer)
        rank = down.shape[0]
        strength = alphas.strength(place, rank, stored.get(found.alpha))
        made.append(
            (layer, lora.LowRank(down, up, scale * strength).requires_grad_(False), strength)
        )
    return made


def _checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise BadInput(
            f"the scale of a LoRA is {scale!r}: give a finite number, 1 for full strength"
        )
    return float(scale)


def _file(path: str | Path, names: Sequence[str], what: str) -> Path:
    path = at_home(path)
    if path.is_dir():
        there = [path / name for name in names if (path / name).is_file()]
        there = there or sorted(path.glob("*.safetensors"))
        if len(there) != 1 and not (there and there[0].name in names):
            raise BadInput(f"{path} holds {len(there)} files that may be a {what}: name one")
        return there[0]
    if not path.is_file():
        raise BadInput(f"there is no {what} at {path}: give a .safetensors file or its folder")
    return path


def _places(
    path: Path,
    stored: Mapping[str, StoredTensor],
    layers: Mapping[str, Mapping[str, Any]],
    unet_config: Mapping[str, Any] | None,
) -> dict[Place, Found]:
    for name in stored:
        for ending, method in UNSUPPORTED.items():
            if ending in name:
                raise UnsupportedModel(
                    f"{path.name}: {name[:80]} is of a {method}, which diptych does not run: give "
                    "a LoRA, or LoCon without Tucker decomposition"
                )
    try:
        found = find_places(stored, layers, unet_config)
    except Unplaced as lost:
        raise WeightsMismatch(
            f"{path.name}: {len(lost.names)} of its {len(stored)} tensors have no place here: "
            f"{', '.join(name[:100] for name in lost.names[:_SHOWN])}"
            f"{', …' if len(lost.names) > _SHOWN else ''}. It is of another family of models, or "
            "no LoRA."
        ) from lost
    if not found:
        raise WeightsMismatch(f"{path.name} holds no tensors: it is no LoRA.")
    return found


def _matrices(
    path: Path, stored: Mapping[str, StoredTensor], found: Found, layer: Layer
) -> tuple[Tensor, Tensor]:
    """Read both matrices in float32, shaped as `layer` wants them."""
    down, up = _tensor(stored[found.down]), _tensor(stored[found.up])
    out, into, *kernel = layer.weight.shape
    rank = down.shape[0] if down.dim() else 0
    # A 1x1 convolution and a matrix are the same, and files mix them.
    flat = not kernel or tuple(kernel) == (1, 1)
    wanted = (rank, into, *kernel)
    fits = tuple(down.shape) == wanted or (flat and tuple(down.shape[:2]) == wanted[:2])
    fits = fits and down.numel() == math.prod(wanted) and rank > 0
    if not fits or tuple(up.shape[:2]) != (out, rank) or up.numel() != out * rank:
        raise WeightsMismatch(
            f"{path.name}: {found.down[:100]} {list(down.shape)} and its counterpart "
            f"{list(up.shape)} do not fit a layer {list(layer.weight.shape)}: it is of another "
            "family of models."
        )
    return down.reshape(wanted), up.reshape(out, rank, *[1] * len(kernel))


class _Alphas:
    """Know how strong an update is meant: alpha / rank, alpha from the file or what lies beside."""

    def __init__(self, path: Path) -> None:
        self._said = _peft_settings(path)

    def strength(self, place: Place, rank: int, alpha: StoredTensor | None) -> float:
        """Return alpha / rank; 1 where nobody says alpha, as everywhere."""
        if alpha is not None:
            if math.prod(alpha.shape) != 1:
                raise WeightsMismatch(f"{alpha.file.name}: an alpha of {place[1]} is not a number.")
            return float(_tensor(alpha)) / rank
        network, layer = place
        said = {key: self._said.get(f"{network}.{key}", self._said.get(key)) for key in _SETTINGS}
        value = said["lora_alpha"]
        patterns = said["alpha_pattern"]
        for pattern, own in (patterns if isinstance(patterns, dict) else {}).items():
            if f".{layer}".endswith(f".{pattern}"):
                value = own
        if isinstance(value, bool) or not isinstance(value, int | float):
            return 1.0
        return value / (math.sqrt(rank) if said["use_rslora"] is True else rank)


_SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora")


def _peft_settings(path: Path) -> dict[str, Any]:
    """Return what PEFT writes beside the numbers: in the file's header or a file of its own."""
    beside = path.with_name("adapter_config.json")
    text = ""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "")
    if not text and path.name.startswith("adapter_model") and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    try:
        said = json.loads(text) if text else {}
    except ValueError as error:
        raise WeightsMismatch(f"{path}: the settings beside its numbers are damaged.") from error
    return said if isinstance(said, dict) else {}


# --- learned words --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Embedding:
    """Hold a learned word: its vectors [n, D] of each text encoder, the same n for all."""

    token: str
    vectors: Mapping[str, Tensor]


@dataclass(eq=False)
class EmbeddingHandle:
    """Hold a word that was added, until `remove`: `ids` are its rows in each text encoder."""

    token: str
    ids: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, nn.Module] = field(repr=False)
    number: int = field(default_factory=_numbers.__next__, repr=False)

    def remove(self) -> None:
        """Take the rows away again, or leave them unused while later ones stand after them."""
        for name, ids in self.ids.items():
            _drop_rows(self.modules[name], set(ids))
        self.ids = {}


_ENCODERS = ("text_encoder", "text_encoder_2")
# The words of files for SDXL: of kohya, and of diffusers' training script.
_TOWERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}


def read_embedding(path: str | Path, widths: Mapping[str, int]) -> Embedding:
    """Read a textual inversion; `widths` gives the hidden size of each text encoder.

    Known are `string_to_param` (a .pt), `emb_params`, `clip_l` with `clip_g` (SDXL), and diffusers'
    one tensor under the word itself. The word is the file's name where the file says none. Raises
    `WeightsMismatch` where the vectors fit no encoder, or an encoder gets none.
    """
    path = _file(path, _EMBEDDING_FILES, "learned word")
    stored = read_embedding_pickle(path) if path.suffix == ".pt" else read_checkpoint([path])
    token = path.stem
    if set(stored) & set(_TOWERS):
        named = {_TOWERS[name]: each for name, each in stored.items() if name in _TOWERS}
    elif len(stored) == 1:
        ((name, each),) = stored.items()
        token = token if name in ("emb_params", "*") else name
        named = {encoder: each for encoder in widths if each.shape[-1:] == (widths[encoder],)}
    else:
        raise WeightsMismatch(
            f"{path.name} holds {len(stored)} tensors: a learned word has one, or clip_l and "
            "clip_g."
        )
    vectors = {}
    for encoder, width in widths.items():
        if encoder not in named:
            raise WeightsMismatch(
                f"{path.name} has no vectors of {width} numbers for the {encoder}: it was made for "
                "another family of models."
            )
        vectors[encoder] = _vectors(path, named[encoder], width)
    if len({len(each) for each in vectors.values()}) != 1:
        raise WeightsMismatch(f"{path.name} has more vectors for one text encoder than the other.")
    return Embedding(token, vectors)


def _vectors(path: Path, stored: StoredTensor, width: int) -> Tensor:
    vectors = _tensor(stored)
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or vectors.shape[1] != width or not len(vectors):
        raise WeightsMismatch(
            f"{path.name}: its vectors are {list(stored.shape)} instead of [n, {width}]: it was "
            "made for another family of models."
        )
    return vectors


def add_embedding(
    modules: Mapping[str, nn.Module], path: str | Path, token: str | None = None
) -> EmbeddingHandle:
    """Add the learned word in `path` to the text encoders among `modules`, under new ids.

    The tokenizer has to learn them: `ClipTokenizer.with_placeholders`. `token` is the word to be
    written in prompts, else the file's own.
    """
    towers = {name: modules[name] for name in _ENCODERS if name in modules}
    tables = {name: _table(tower) for name, tower in towers.items()}
    found = read_embedding(path, {name: table.weight.shape[1] for name, table in tables.items()})
    ids = {name: _add_rows(tower, found.vectors[name]) for name, tower in towers.items()}
    return EmbeddingHandle(token or found.token, ids, towers)


def _table(tower: nn.Module) -> nn.Embedding:
    table: nn.Embedding = tower.get_submodule("text_model.embeddings.token_embedding")  # type: ignore[assignment]
    return table


def _add_rows(tower: nn.Module, rows: Tensor) -> tuple[int, ...]:
    import torch

    table = _table(tower)
    first = len(table.weight)
    with torch.no_grad():
        _resize(table, torch.cat([table.weight, rows.to(table.weight)]))
    return tuple(range(first, first + len(rows)))


def _drop_rows(tower: nn.Module, ids: set[int]) -> None:
    """Forget `ids`, and with them all unused rows at the end."""
    table = _table(tower)
    unused: set[int] = table.__dict__.setdefault("unused_rows", set())
    unused |= ids
    kept = len(table.weight)
    while kept - 1 in unused:
        kept -= 1
        unused.remove(kept)
    if kept < len(table.weight):
        _resize(table, table.weight[:kept].detach().clone())
    if not unused:
        del table.__dict__["unused_rows"]


def _resize(table: nn.Embedding, weight: Tensor) -> None:
    # The parameter stays: whoever holds it sees the rows too.
    table.weight.data = weight
    table.num_embeddings = len(weight)


# --- reading --------------------------------------------------------------------------------------


def _tensor(stored: StoredTensor) -> Tensor:
    """Read one tensor, in float32."""
    import torch

    if stored.dtype not in _FLOATS and stored.shape:
        raise WeightsMismatch(f"{stored.file.name}: a tensor in it is of whole numbers.")
    flat = torch.empty(stored.span, dtype=getattr(torch, stored.dtype))
    if stored.span:
        with stored.file.open("rb") as file:
            read_into(flat.view(torch.uint8).numpy().data, stored, file)
    if stored.strides is None:
        return flat.view(stored.shape).float()
    return flat.as_strided(stored.shape, stored.strides).float().contiguous()
