"""Run PyTorch modules as networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from diptych.models.fused_projections import fuse_projections
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.runtimes.network import Network, check_wanted
from diptych.weights.files import ModelFolder
from diptych.weights.load import load_captioner

__all__ = [
    "ChoosingDecoder",
    "TorchDecoder",
    "TorchEncoder",
    "faster",
    "open_checkpoint",
    "torch_networks",
    "twin",
]


def open_checkpoint(
    model: ModelFolder, device: str, dtype: str
) -> tuple[dict[str, Network], nn.Module, str, str]:
    """Load `model`; return its networks, their module, the device and the name of the dtype."""
    chosen = best_device() if device == "auto" else device
    precision = None if dtype == "auto" else dtype
    module = faster(load_captioner(model, device=chosen, dtype=precision))
    if chosen.startswith("cuda"):
        fuse_projections(module)
    found = next(module.parameters()).dtype
    return torch_networks(module), module, chosen, str(found).removeprefix("torch.")


def torch_networks(module: VisionEncoderDecoder) -> dict[str, Network]:
    """Wrap the two halves of `module`, which is left as it is."""
    device = _device(module).type
    if device == "cuda":
        from diptych.runtimes.on_torch_held import HoldingDecoder, RecordedEncoder

        return {"encoder": RecordedEncoder(module), "decoder": HoldingDecoder(module)}
    # On a CPU logits need no transfer, and NumPy ranks them sooner than torch does.
    decoder = TorchDecoder if device == "cpu" else ChoosingDecoder
    return {"encoder": TorchEncoder(module), "decoder": decoder(module)}


class TorchEncoder:
    """Turn `pixel_values` [B, C, H, W] into what the decoder takes of the picture."""

    def __init__(self, module: VisionEncoderDecoder) -> None:
        self._module = module
        self.inputs = {"pixel_values": "B C H W"}
        self.outputs = (
            {"prefix_embeds": "B P D"}
            if module.config.bridge == "prefix"
            else {"cross_key_values": "L 2 B heads P d"}
        )

    @torch.inference_mode()
    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        check_wanted(wanted, self.outputs)
        return self._encode(_tensor(arrays["pixel_values"], self._module))

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self._module.encode(pixel_values),)


class TorchDecoder:
    """Run one step of the decoder; the rows N are B pictures times the beams of each."""

    def __init__(self, module: VisionEncoderDecoder) -> None:
        self._module = module
        prefix = module.config.bridge == "prefix"
        self._bridge = "prefix_embeds" if prefix else "cross_key_values"
        self.inputs = {
            "input_ids": "N T",
            "past_key_values": "L 2 N heads S d",
            self._bridge: "N P D" if prefix else "L 2 B heads P d",
        }
        self.outputs = {
            "logits": "N V",
            "present_key_values": "L 2 N heads S+T d",
            "image_attention": "N T P",
        }

    @torch.inference_mode()
    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        names = check_wanted(wanted, self.outputs)
        logits, present, seen = self._step(arrays, "image_attention" in names)
        made = {"present_key_values": present, "logits": _numpy(logits)}
        if seen is not None:
            made["image_attention"] = _numpy(seen)
        return tuple(made[name] for name in names)

    def _step(
        self, arrays: Mapping[str, Any], need_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        module = self._module
        past, bridged = (arrays.get(name) for name in ("past_key_values", self._bridge))
        return module.step(
            torch.as_tensor(arrays["input_ids"], device=_device(module)),
            None if bridged is None else _tensor(bridged, module),
            None if past is None else _tensor(past, module),
            need_weights,
        )


class ChoosingDecoder(TorchDecoder):
    """Run a decoder on a GPU: its logits stay there where the best words suffice."""

    @torch.inference_mode()
    def best(self, count: int, /, **arrays: Any) -> tuple[Any, ...]:
        """Return the best words as `ChoosingNetwork` says."""
        logits, present, _ = self._step(arrays, False)
        logits = logits.float()
        values, token_ids = logits.topk(min(count, logits.shape[1]), dim=1)
        log_sums = (logits - values[:, :1]).exp().sum(dim=1).log()
        return token_ids.cpu().numpy(), _numpy(values), _numpy(log_sums), present


def faster(module: VisionEncoderDecoder) -> VisionEncoderDecoder:
    """Return `module`, or for float32 on a CPU a twin that shares its weights and runs faster.

    torch multiplies float32 matrices by MKL, which leaves half of the speed of a processor that is
    not Intel's unused; oneDNN, which torch brings too, does not.
    """
    weight = module.decoder.wte.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_onednn():
        return module
    fast = twin(module)
    for parent in [*fast.modules()]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, OneDnnLinear(child.weight, child.bias))
    if fast.decoder.lm_head is None:
        fast.decoder.lm_head = OneDnnLinear(fast.decoder.wte.weight, None)
    return fast


def twin(module: VisionEncoderDecoder) -> VisionEncoderDecoder:
    """Return a second module over the same tensors, to be changed without changing the first."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


class OneDnnLinear(nn.Linear):
    """Multiply by oneDNN; holds the weights of another Linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # not Linear's, which makes weights of its own
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        self.out_features, self.in_features = weight.shape

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which finds oneDNN by itself, and not this operator
            return F.linear(hidden, self.weight, self.bias)
        return _multiply(hidden, self.weight, self.bias)


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return product


def has_onednn() -> bool:
    """Tell whether the operator, which torch keeps to itself, is there and right."""
    hidden, weight, bias = torch.ones(2, 3), torch.arange(12.0).reshape(4, 3), torch.ones(4)
    try:
        found = _multiply(hidden, weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(torch.allclose(found, F.linear(hidden, weight, bias)))


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _tensor(array: Any, module: nn.Module) -> Tensor:
    parameter = next(module.parameters())
    return torch.as_tensor(array).to(parameter.device, parameter.dtype)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array
