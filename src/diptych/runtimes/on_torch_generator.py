"""Run the PyTorch modules of a generator as networks.

They take arrays or tensors of any kind and give float32 tensors on the device they run on, so that
what stands between them (sampler, guidance) is computed in float32. Numbers that float16 would
round, as timesteps are, reach the modules in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diptych.models import clip_text, tiny_vae, unet, vae
from diptych.models.fused_projections import fuse_projections
from diptych.runtimes.network import OpenNetworks, check_wanted
from diptych.runtimes.on_torch import best_device
from diptych.runtimes.on_torch_recorded import RecordedNetwork
from diptych.runtimes.on_torch_widened import computed_in, widening
from diptych.weights.diffusion import GeneratorFolder

__all__ = [
    "Stage",
    "TorchNetwork",
    "generator_networks",
    "lay_out",
    "layout",
    "open_generator_checkpoint",
    "open_preview_vae",
]

logger = logging.getLogger("diptych")

_WORKING_ROOM = 1 << 30  # bytes that a picture of 512 × 512 takes beside the weights
_KEPT_IN_FLOAT32 = ("timestep", "time_ids")


def open_generator_checkpoint(
    model: GeneratorFolder,
    device: str,
    dtype: str,
    *,
    offload: bool | None = None,
    reason: str = "",
) -> OpenNetworks:
    """Load the modules of `model` and open them; see `generator_networks`.

    `dtype` auto is float16 on an NVIDIA card and float32 elsewhere.
    """
    from diptych.weights.load_generator import load_generator
    from diptych.weights.load_module import as_device

    device = str(as_device(best_device() if device == "auto" else device))
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    roomy = offload is False or (offload is None and _has_room(device, _file_bytes(model)))
    modules = load_generator(model, device=device if roomy else "cpu", dtype=dtype)
    if not roomy and offload is None:
        offload = not _has_room(device, sum(_bytes(module) for module in modules.values()))
    for module in modules.values():
        module.eval().requires_grad_(False)
    lay_out(modules, device)
    offload = bool(offload)
    record = device.startswith("cuda") and not offload
    return generator_networks(modules, device, offload=offload, record=record, reason=reason)


def generator_networks(
    modules: Mapping[str, nn.Module],
    device: str | None = None,
    *,
    offload: bool = False,
    record: bool = False,
    reason: str = "it was asked for",
) -> OpenNetworks:
    """Wrap `modules` (text_encoder, text_encoder_2, unet, vae) as they are.

    They move to `device`, if it is given. With `offload` they wait in main memory, and each is on
    the device for its turn only. `record` launches the UNet as CUDA graphs: not for one that
    learns, since a graph keeps no way back.
    """
    parameter = next(modules["unet"].parameters())
    device = str(parameter.device) if device is None else device
    stage = Stage(modules, torch.device(device), offload)
    networks: dict[str, TorchNetwork] = {}
    for name in ("text_encoder", "text_encoder_2"):
        if name in modules:
            io = (clip_text.INPUTS, clip_text.OUTPUTS)
            networks[name] = TorchNetwork(stage, name, _encode_text, *io)
    inputs = cast(unet.UNet, modules["unet"]).config.inputs
    calls = (RecordedNetwork(_predict), RecordedNetwork(_finish)) if record else (_predict, _finish)
    networks["unet"] = TorchNetwork(stage, "unet", calls[0], inputs, unet.OUTPUTS)
    io = ({**inputs, **unet.DEEP_FEATURES}, {"noise_pred": unet.OUTPUTS["noise_pred"]})
    networks["unet_shallow"] = TorchNetwork(stage, "unet", calls[1], *io)
    networks["vae_encoder"] = TorchVae(stage, "vae", _encode_picture, vae.INPUTS, vae.OUTPUTS)
    io = (vae.DECODER_INPUTS, vae.DECODER_OUTPUTS)
    networks["vae_decoder"] = TorchVae(stage, "vae", _decode_picture, *io)
    if offload:
        reason = f"{reason}; each network is on {device} for its turn only"
    if computed_in(parameter.dtype, torch.device(device)) != parameter.dtype:
        kind = str(parameter.dtype).removeprefix("torch.")
        reason = f"{reason}; computed in float32: this processor multiplies no {kind}"
    return OpenNetworks(
        networks,
        runtime="torch",
        device=device,
        dtype=str(parameter.dtype).removeprefix("torch."),
        reason=reason,
        modules=modules,
    )


def lay_out(modules: Mapping[str, nn.Module], device: str) -> None:
    """Keep kernels in the order in which convolutions read maps; the numbers stay the same.

    On a GPU, where it is the launches that take time, projections of one input become one product.
    """
    for name, module in modules.items():
        memory_format = layout(name, torch.device(device))
        module.to(memory_format=memory_format)  # type: ignore[call-overload]
        if device.startswith("cuda"):
            fuse_projections(module)


def layout(module: str, device: torch.device) -> torch.memory_format:
    """Return the order of the maps that a network works on: channels last, but for a VAE on CUDA.

    There every norm of groups makes them channels first (https://github.com/pytorch/pytorch/issues/111824),
    and the VAE's are so large that turning them back takes more time than it saves.
    """
    turns = module == "vae" and device.type == "cuda"
    return torch.contiguous_format if turns else torch.channels_last


def open_preview_vae(
    folder: str | Path, device: str
) -> tuple[TorchNetwork, tiny_vae.TinyVaeConfig]:
    """Open the decoder of a tiny VAE, which stays on `device`; see `load_tiny_vae`."""
    from diptych.weights.load_tiny_vae import load_tiny_vae

    module = load_tiny_vae(folder, device)
    stage = Stage({"preview_vae": module}, torch.device(device), offload=False)
    io = (tiny_vae.INPUTS, tiny_vae.OUTPUTS)
    return TorchNetwork(stage, "preview_vae", _decode_picture, *io), module.config


@dataclass
class Stage:
    """Hold the modules, and which of them is on the device when not all can be."""

    modules: Mapping[str, nn.Module]
    device: torch.device
    offload: bool
    on: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for module in self.modules.values():
            module.to("cpu" if self.offload else self.device)

    def enter(self, name: str) -> nn.Module:
        """Return a module, on the device; another whose turn it was leaves first."""
        module = self.modules[name]
        if self.offload and self.on != name:
            if self.on is not None:
                self.modules[self.on].to("cpu")
                self.on = None
            module.to(self.device)
            self.on = name
        return module


class TorchNetwork:
    """Run one module: `call` gives it the arrays that it takes, by name."""

    def __init__(
        self,
        stage: Stage,
        module: str,
        call: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, ...]],
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
    ) -> None:
        self._stage, self._module, self._call = stage, module, call
        self.inputs, self.outputs = dict(inputs), dict(outputs)

    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Tensor, ...]:
        names = check_wanted(wanted, self.outputs)
        # Outside of inference mode: it would make the weights tensors that nobody may change.
        module = self._stage.enter(self._module)
        made = dict(zip(self.outputs, self._run(module, arrays), strict=True))
        return tuple(made[name] for name in names)

    def _run(self, module: nn.Module, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
        dtype = next(module.parameters()).dtype
        computed = computed_in(dtype, self._stage.device)
        with torch.inference_mode(), widening(dtype, computed):
            placed = {name: self._place(name, each, computed) for name, each in arrays.items()}
            return tuple(each.float() for each in self._call(module, placed))

    def _place(self, name: str, array: Any, dtype: torch.dtype) -> Any:
        if array is None or isinstance(array, int | float):
            return array
        tensor = torch.as_tensor(array, device=self._stage.device)
        if name == "input_ids":
            return tensor.long()
        if not tensor.is_floating_point() or name in _KEPT_IN_FLOAT32:
            return tensor.float()
        tensor = tensor.to(dtype)
        if tensor.dim() != 4:
            return tensor
        return tensor.contiguous(memory_format=layout(self._module, self._stage.device))


class TorchVae(TorchNetwork):
    """Run the autoencoder; what overflows in 16 bits is computed again in float32."""

    _overflows = False

    def _run(self, module: nn.Module, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
        # A run that trains in half precision draws its samples so, which the VAE need not bear.
        with torch.autocast(self._stage.device.type, enabled=False):
            return self._run_finite(module, arrays)

    def _run_finite(self, module: nn.Module, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
        dtype = next(module.parameters()).dtype
        if computed_in(dtype, self._stage.device) == torch.float32:
            return super()._run(module, arrays)
        forced = dtype == torch.float16 and bool(getattr(module.config, "force_upcast", False))
        if not forced and not self._overflows:
            made = super()._run(module, arrays)
            if _all_finite(made):
                return made
        module.float()
        try:
            made = super()._run(module, arrays)
        finally:
            module.to(dtype)  # exact: they were numbers of this kind
        if not forced and not self._overflows and _all_finite(made):
            kind = str(dtype).removeprefix("torch.")
            logger.warning("the VAE overflows in %s: it runs in float32 from here on", kind)
            self._overflows = True
        return made


def _encode_text(module: nn.Module, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = module(arrays["input_ids"], int(arrays.get("clip_skip") or 0))
    return made


def _predict(module: Any, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = module.predict(**arrays)
    return made


def _finish(module: Any, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return module.predict(**arrays)[:1]  # type: ignore[no-any-return]


def _encode_picture(module: Any, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = module.encode(arrays["pixel_values"])
    return made


def _decode_picture(module: Any, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return (module.decode(arrays["latents"]),)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _has_room(device: str, weights: int) -> bool:
    """Tell whether a GPU holds `weights` bytes and what it works in; other devices do."""
    if not device.startswith("cuda"):
        return True
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free) > weights + _WORKING_ROOM


def _file_bytes(model: GeneratorFolder) -> int:
    files: set[Path] = {path for paths in model.weights.values() for path in paths}
    return sum(path.stat().st_size for path in files)


def _bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters())
