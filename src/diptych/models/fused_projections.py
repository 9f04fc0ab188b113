"""Let one product do for several Linear layers that read the same input (fused QKV)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FusedProjections", "fuse_projections"]


class FusedProjections(nn.Module):
    """Hold layers that read one input, as queries, keys and values do.

    `fuse` lays their weights side by side in memory. They stay parameters of their own, under
    their own names: what changes them in place (a LoRA that is fused, a state that is loaded)
    changes the whole, and what gives them other memory undoes it. While learning, and beside a
    live LoRA, every layer computes by itself.
    """

    _whole: tuple[Tensor, Tensor | None] | None = None
    _parts: tuple[Tensor | None, ...] = ()

    def reading_one(self) -> tuple[nn.Linear, ...]:
        """Return the layers that read one input."""
        raise NotImplementedError

    @torch.no_grad()
    def fuse(self) -> None:
        """Lay the weights side by side, where all layers are plain ones and alike."""
        layers = self.reading_one()
        kinds = {(type(each), each.weight.dtype, each.bias is None) for each in layers}
        if len(kinds) > 1 or type(layers[0]) is not nn.Linear:
            return
        wholes: list[Tensor | None] = []
        for name in ("weight", "bias"):
            parts = [getattr(each, name) for each in layers]
            whole = None if parts[0] is None else torch.cat([each.detach() for each in parts])
            if whole is not None:
                places = torch.split(whole, [len(each) for each in parts])
                for part, place in zip(parts, places, strict=True):
                    part.data = place
            wholes.append(whole)
        assert wholes[0] is not None
        self._whole = (wholes[0], wholes[1])
        self._parts = tuple(part for each in layers for part in (each.weight, each.bias))

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return what each layer makes of `hidden` [..., D], by one product if they are fused."""
        layers = self.reading_one()
        if not self._is_fused(layers):
            return tuple(layer(hidden) for layer in layers)
        assert self._whole is not None
        made = F.linear(hidden, *self._whole)
        return torch.split(made, [layer.out_features for layer in layers], -1)

    def _is_fused(self, layers: tuple[nn.Linear, ...]) -> bool:
        if self._whole is None or torch.is_grad_enabled():
            return False
        parts = tuple(part for each in layers for part in (each.weight, each.bias))
        same = all(one is other for one, other in zip(parts, self._parts, strict=True))
        return same and not any(getattr(each, "live", ()) for each in layers)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # Another device or type: every parameter gets memory of its own.
        self._whole, self._parts = None, ()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # A copy has memory of its own as well.
        return {name: each for name, each in vars(self).items() if name not in ("_whole", "_parts")}


def fuse_projections(module: nn.Module) -> None:
    """Fuse the layers of `module` that read one input, wherever it has such."""
    for each in module.modules():
        if isinstance(each, FusedProjections):
            each.fuse()
