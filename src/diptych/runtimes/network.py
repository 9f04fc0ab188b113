"""Say what a network is to those who call it, and open those of a model in the best runtime."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput, MissingExtra, UnsupportedModel
from diptych.weights.files import ModelFolder

if TYPE_CHECKING:
    from torch import nn

    from diptych.runtimes.tiling import Tiling
    from diptych.weights.diffusion import GeneratorFolder

__all__ = [
    "BRIDGED",
    "DTYPES",
    "GENERATOR_NETWORKS",
    "RUNTIMES",
    "STYLE_INPUTS",
    "Array",
    "ChoosingNetwork",
    "HeldSearch",
    "HoldingNetwork",
    "Network",
    "OpenNetworks",
    "check_wanted",
    "gather_rows",
    "open_generator_networks",
    "open_networks",
    "require_torch",
    "unet_inputs",
]

logger = logging.getLogger("diptych")

Array = Any
"""A NumPy array or a torch tensor: callers use only what both share."""

# What the encoder gives and the decoder takes of a picture, by bridge.
BRIDGED = {"cross-attention": "cross_key_values", "prefix": "prefix_embeds"}
RUNTIMES = ("auto", "onnxruntime", "openvino", "torch")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The networks of a generator, with the names and shapes of what they take and give, as in `models`.
_TEXT_ENCODER = ({"input_ids": "B T"}, {"encoder_hidden_states": "B T D", "pooled": "B D"})
_UNET = {"latents": "B C h w", "timestep": "B", "encoder_hidden_states": "B T D"}
_ON_REQUEST = ("image_attention", "deep_features")
GENERATOR_NETWORKS: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "text_encoder": _TEXT_ENCODER,
    "text_encoder_2": _TEXT_ENCODER,  # SDXL only
    "unet": (_UNET, {"noise_pred": "B 4 h w", "deep_features": "B C h w"}),
    # Its last block alone, on the features of an earlier step; artifacts may lack it.
    "unet_shallow": ({"deep_features": "B C h w", **_UNET}, {"noise_pred": "B 4 h w"}),
    "vae_encoder": (
        {"pixel_values": "B 3 H W"},
        {"mean": "B c h w", "log_variance": "B c h w"},
    ),
    "vae_decoder": ({"latents": "B c h w"}, {"pixel_values": "B 3 H W"}),
}
# What the UNet takes besides for style transfer; it may be left out.
STYLE_INPUTS = ("key_rows", "query_rows", "query_preservation", "attention_temperature")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


class Network(Protocol):
    """Run one network: arrays in by name, arrays out in order.

    `inputs` and `outputs` give names and shape letters. The encoder maps `pixel_values` to
    `cross_key_values` or `prefix_embeds`; the decoder takes `input_ids`, `past_key_values` (None
    at the start) and what the encoder gave (with a prefix in the first call only, then None).
    """

    @property
    def inputs(self) -> Mapping[str, str]: ...

    @property
    def outputs(self) -> Mapping[str, str]: ...

    def __call__(
        self, wanted: Sequence[str] | None = None, /, **arrays: Array
    ) -> tuple[Array, ...]:
        """Return the outputs in `wanted`; None is all but `image_attention` and `deep_features`.

        `logits` and `image_attention` are NumPy float32; caches stay where the runtime keeps them.
        What the networks of a generator give is float32 and of their runtime's kind.
        """
        ...


@runtime_checkable
class ChoosingNetwork(Network, Protocol):
    """A decoder that can keep its logits where it runs, and tell the best words only."""

    def best(
        self, count: int, /, **arrays: Array
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], Array]:
        """Return what the logits [N, V] say of the `count` best words, and `present_key_values`.

        First come their ids [N, K] in any order, K being `count` or V, their logits [N, K], and
        [N] logarithms of the sums of exp(logit - highest logit) over all words.
        """
        ...


class HeldSearch(Protocol):
    """Hold the cache of a search where the decoder runs; rows of a call are those of a `Step`."""

    def logits(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """Feed tokens [N, 1] and return the logits [N, V]; `parents` None leaves rows in place."""
        ...

    def best(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Feed tokens and return what `ChoosingNetwork.best` says of the `count` best words."""
        ...


@runtime_checkable
class HoldingNetwork(ChoosingNetwork, Protocol):
    """A decoder that can keep the cache of a search to itself."""

    def hold(self, past_key_values: Array, bridged: Array | None, images: int) -> HeldSearch | None:
        """Take over a search whose rows are in `past_key_values`; None where that gains nothing."""
        ...


class OpenNetworks(dict[str, Network]):
    """Hold the networks of a model by name, where they run, and why there.

    `modules` are the PyTorch modules behind the networks, for those who change them: a generator's
    by their names, a captioner's as "captioner"; None in another runtime.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        *,
        runtime: str,
        device: str,
        dtype: str,
        reason: str,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(networks)
        self.runtime = runtime
        self.device = device
        self.dtype = dtype
        self.reason = reason
        self.modules = modules

    def place(self, name: str) -> str:
        """Say where the networks of the model called `name` run, and why there."""
        return _place(name, self.runtime, self.device, self.dtype, self.reason)

    def to_compile(self, name: str) -> Mapping[str, nn.Module]:
        """Return `modules`; raises `UnsupportedModel` where the model called `name` has none."""
        if self.modules is None:
            raise UnsupportedModel(
                f"{name} runs in {self.runtime}, which compiles by itself: load it with "
                "runtime='torch'"
            )
        return self.modules

    def array(self, values: Any) -> Array:
        """Return `values` as the runtime's kind of array, where the networks want it.

        Floats become float32, whatever the networks compute in; whole numbers int64.
        """
        plain = np.asarray(values)
        plain = plain.astype(np.float32 if plain.dtype.kind == "f" else np.int64, copy=False)
        if self.runtime != "torch":
            return plain
        import torch

        return torch.tensor(plain, device=self.device)

    def numpy(self, array: Array) -> NDArray[np.float32]:
        """Return what a network gave as NumPy float32."""
        if isinstance(array, np.ndarray):
            return array.astype(np.float32, copy=False)
        plain: NDArray[np.float32] = array.float().cpu().numpy()
        return plain


def open_networks(
    model: ModelFolder, runtime: str = "auto", device: str = "auto", dtype: str = "auto"
) -> OpenNetworks:
    """Open `encoder` and `decoder` of `model`.

    `runtime` auto is onnxruntime where the model has ONNX networks and nothing asked for speaks
    against it, else torch; openvino where only it computes in the `dtype` that is asked for. Raises
    `BadInput` for a value or combination that cannot be, and `MissingExtra` where the runtime is
    not installed.
    """
    _check(runtime, device, dtype)
    chosen, reason = _choose(model, runtime, device, dtype)
    modules = None
    if chosen != "torch":
        networks, dtype = _open_files(model, chosen, dtype)
        device = "cpu"
    else:
        require_torch("running a PyTorch checkpoint")
        from diptych.runtimes.on_torch import open_checkpoint

        networks, module, device, dtype = open_checkpoint(model, device, dtype)
        modules = {"captioner": module}
    _tell(model, chosen, device, dtype, reason)
    return OpenNetworks(
        networks, runtime=chosen, device=device, dtype=dtype, reason=reason, modules=modules
    )


def open_generator_networks(
    model: GeneratorFolder,
    runtime: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    offload: bool | None = None,
    tiling: Tiling | None = None,
) -> OpenNetworks:
    """Open `text_encoder`, `text_encoder_2` (SDXL), `unet`, `vae_encoder` and `vae_decoder`.

    The runtime is chosen as by `open_networks`. With `offload` each network is on the GPU for its
    turn only; None does so where the GPU has too little free memory for all. The autoencoder takes
    pictures in pieces as `tiling` says: by itself large ones only.
    """
    _check(runtime, device, dtype)
    chosen, reason = _choose(model, runtime, device, dtype)
    if chosen != "torch":
        networks, dtype = _open_files(model, chosen, dtype, model.configs["unet"])
        opened = OpenNetworks(networks, runtime=chosen, device="cpu", dtype=dtype, reason=reason)
    else:
        require_torch("running a PyTorch checkpoint")
        from diptych.runtimes.on_torch_generator import open_generator_checkpoint

        opened = open_generator_checkpoint(model, device, dtype, offload=offload, reason=reason)
    _cut_up(opened, model.configs["vae"], tiling)
    _tell(model, opened.runtime, opened.device, opened.dtype, opened.reason)
    return opened


def _open_files(
    model: ModelFolder | GeneratorFolder,
    runtime: str,
    dtype: str,
    unet: Mapping[str, Any] | None = None,
) -> tuple[Mapping[str, Network], str]:
    """Return the networks of ONNX files, a generator's if `unet` is given, and what they are in."""
    stored = model.precision or ""
    told = {"fp32": "float32"}.get(stored, stored)
    if runtime == "openvino":
        if not _is_installed("openvino"):
            raise MissingExtra("openvino", "running ONNX networks in OpenVINO")
        from diptych.runtimes import on_openvino

        dtype = on_openvino.check_dtype(dtype)
        told = told if dtype == "float32" else dtype
        if unet is None:
            return on_openvino.open_artifact(model.networks, dtype), told
        return on_openvino.open_generator_files(model.networks, unet, dtype), told
    from diptych.runtimes import on_onnxruntime

    if unet is None:
        return on_onnxruntime.open_artifact(model.networks), told
    return on_onnxruntime.open_generator_files(model.networks, unet), told


def _cut_up(networks: OpenNetworks, vae: Mapping[str, Any], tiling: Tiling | None) -> None:
    from diptych.runtimes.tiling import InPieces

    downsampling = vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)
    for name in ("vae_encoder", "vae_decoder"):
        networks[name] = InPieces(networks[name], downsampling, tiling)


def unet_inputs(config: Mapping[str, Any]) -> dict[str, str]:
    """Name what the UNet of `config` takes: SDXL's and LCM's take more than the others."""
    inputs = dict(GENERATOR_NETWORKS["unet"][0])
    if config.get("addition_time_embed_dim") is not None:
        inputs |= {"text_embeds": "B E", "time_ids": "B 6"}
    if config.get("time_cond_proj_dim") is not None:
        inputs |= {"timestep_cond": "B G"}
    return inputs


def require_torch(purpose: str, extra: str = "torch") -> None:
    """Raise `MissingExtra` for `purpose` unless the packages of `extra` are installed."""
    needed = ("torch", "onnx") if extra == "export" else ("torch",)
    if not all(_is_installed(package) for package in needed):
        raise MissingExtra(extra, purpose)


def gather_rows(cache: Array, rows: Sequence[int] | Array) -> Array:
    """Return `cache` [L, 2, N, heads, S, d] with the rows N that are named, in that order.

    As `cache[:, :, rows]`, except that NumPy would leave the result in another memory order, which
    takes ten times as long and has to be straightened before the next call.
    """
    if isinstance(cache, np.ndarray):
        return np.take(cache, rows, axis=2)
    import torch

    return cache.index_select(2, torch.as_tensor(rows, device=cache.device))


def check_wanted(wanted: Sequence[str] | None, outputs: Mapping[str, str]) -> tuple[str, ...]:
    """Return the outputs to compute, in order; None stands for all that need no request."""
    if wanted is None:
        return tuple(name for name in outputs if name not in _ON_REQUEST)
    if unknown := [name for name in wanted if name not in outputs]:
        raise BadInput(f"no output is called {unknown[0]!r}: there are {', '.join(outputs)}")
    return tuple(wanted)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _check(runtime: str, device: str, dtype: str) -> None:
    if runtime not in RUNTIMES:
        raise BadInput(f"runtime is {runtime!r}: give {_either(RUNTIMES)}")
    if dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}: give {_either(DTYPES)}")
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise BadInput(f"device is {device!r}: give auto, cpu, cuda, cuda:1 (any number) or mps")


def _tell(
    model: ModelFolder | GeneratorFolder, runtime: str, device: str, dtype: str, reason: str
) -> None:
    logger.info("%s", _place(model.name, runtime, device, dtype, reason))


def _place(name: str, runtime: str, device: str, dtype: str, reason: str) -> str:
    return f"{name} runs in {runtime} on {device} as {dtype}: {reason}"


def _choose(
    model: ModelFolder | GeneratorFolder, runtime: str, device: str, dtype: str
) -> tuple[str, str]:
    """Return the runtime and the reason for it."""
    against = ""  # what speaks against running its ONNX files
    if not model.networks:
        against = (
            "it has no ONNX networks: make them with "
            f"`diptych export {model.name} FOLDER` and load FOLDER"
        )
    elif device not in ("auto", "cpu"):
        against = f"its ONNX networks run on the cpu, not on {device}"
    elif dtype not in ("auto", "float32") and runtime != "openvino":
        against = f"its ONNX networks are {model.precision}, not {dtype}"
        if (model.precision, dtype) == ("fp16", "float16"):
            against = "its ONNX networks are stored in fp16, and compute in float32"
    if runtime == "auto" and dtype == "bfloat16" and _is_left_to_openvino(model, device):
        return "openvino", "it alone computes in bfloat16 with ONNX networks"
    if runtime in ("onnxruntime", "openvino") and against:
        raise BadInput(f"{model.name} cannot run in {runtime}: {against}")
    if runtime == "torch" or against:
        if not model.weights:
            why = against or "it holds ONNX networks only: load it with runtime='onnxruntime'"
            raise BadInput(f"{model.name} has no PyTorch weights, and {why}")
        return "torch", "it was asked for" if runtime == "torch" else against.partition(":")[0]
    if runtime != "auto":
        return runtime, "it was asked for"
    return "onnxruntime", "the model has ONNX networks"


def _is_left_to_openvino(model: ModelFolder | GeneratorFolder, device: str) -> bool:
    files_only = bool(model.networks) and not model.weights
    return files_only and device in ("auto", "cpu") and _is_installed("openvino")


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
