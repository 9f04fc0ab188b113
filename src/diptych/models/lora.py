"""Change a network by low-rank updates to its layers, and take them back without a trace."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LowRank", "UpdatedLayer", "attach", "detach", "layers", "refresh"]

Layer = nn.Linear | nn.Conv2d


class LowRank(nn.Module):
    """Add `scale * up(down(x))` to what a layer gives (Hu et al. 2021).

    `down` [r, in] and `up` [out, r] for a Linear; [r, in, kh, kw] and [out, r, 1, 1] for a
    convolution, whose stride, padding and dilation the first of the two takes over.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = scale

    def forward(self, hidden: Tensor, layer: Layer) -> Tensor:
        """Return what the update adds to `layer(hidden)`."""
        if isinstance(layer, nn.Conv2d):
            assert isinstance(layer.padding, tuple), "no network here pads by name"
            narrow = F.conv2d(hidden, self.down, None, layer.stride, layer.padding, layer.dilation)
            added = F.conv2d(narrow, self.up)
        else:
            added = F.linear(F.linear(hidden, self.down), self.up)
        # A product of whole maps, forwards and backwards, for nothing.
        return added if self.scale == 1.0 else added * self.scale

    def delta(self) -> Tensor:
        """Return what the update adds to the layer's weight, in its shape, in float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.view(self.up.shape[0], *self.down.shape[1:])


class UpdatedLayer(nn.Module):
    """Stand before a Linear or Conv2d, as a class mixed into it: `live` and `fused` updates.

    The layer keeps its place, its parameters and their names; only its class changes and returns.
    """

    live: nn.ModuleList
    fused: list[LowRank]
    original: Tensor | None  # the weight before any update was fused into it, in main memory
    weight: nn.Parameter

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = super().forward(hidden)
        for update in self.live:
            made = made + update(hidden, self)
        return made


def layers(module: nn.Module) -> dict[str, Layer]:
    """Return every layer of `module` that can take an update, by its path."""
    return {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear | nn.Conv2d)
    }


def attach(layer: Layer, update: LowRank, *, fused: bool = False) -> None:
    """Add `update` to `layer`: beside it, or `fused` into its weight.

    Fused it costs nothing per call, but the weight as it was is kept as well; live, the update
    can be changed and trained.
    """
    if not isinstance(layer, UpdatedLayer):
        kind: Any = type(layer)
        layer.__class__ = _updated(kind)
        changed = cast(UpdatedLayer, layer)
        changed.live, changed.fused, changed.original = nn.ModuleList(), [], None
    changed = cast(UpdatedLayer, layer)
    if fused:
        changed.fused.append(update)
        refresh([layer])
    else:
        update.to(changed.weight.device, changed.weight.dtype)
        changed.live.append(update)


def detach(layer: Layer, update: LowRank) -> None:
    """Take `update` away again; without any, the layer and its weight are what they were."""
    assert isinstance(layer, UpdatedLayer), "nothing was attached"
    if any(each is update for each in layer.fused):
        layer.fused = [each for each in layer.fused if each is not update]
        refresh([cast(Layer, layer)])
    else:
        layer.live = nn.ModuleList(each for each in layer.live if each is not update)
    if not layer.fused and not layer.live:
        del layer.live
        del layer.fused, layer.original
        layer.__class__ = type(layer).__mro__[2]


@torch.no_grad()
def refresh(changed: Iterable[Layer]) -> None:
    """Compute weights anew from the original and what is fused now, in place."""
    for layer in changed:
        if not isinstance(layer, UpdatedLayer):
            continue
        if layer.original is None and layer.fused:
            layer.original = layer.weight.detach().to("cpu", copy=True)
        if layer.original is None:
            continue
        if layer.fused:
            device = layer.weight.device
            # In float32 until the end: two small updates may each round to nothing in 16 bits.
            whole = layer.original.to(device, torch.float32, copy=True)
            for update in layer.fused:
                whole += update.to(device).delta()
            layer.weight.copy_(whole)
        else:
            layer.weight.copy_(layer.original)
            layer.original = None


@functools.cache
def _updated(kind: type[Any]) -> type[Any]:
    return type(f"Updated{kind.__name__}", (UpdatedLayer, kind), {})
