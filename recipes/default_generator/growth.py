"""Begin a deeper UNet as one that does what a shallower one does (Chen et al. 2016, Net2Net)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

# What ends a branch beside a residual: at zero, the block around it gives back what it got.
_ENDS = re.compile(r"(conv2|proj_out|to_out\.0|ff\.net\.2)\.(weight|bias)$")
_PLACE = re.compile(r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(?P<layer>\d+)\.")


@torch.no_grad()
def grow(unet: nn.Module, former: Mapping[str, Tensor]) -> None:
    """Load `former` into `unet`, which has as many layers a level, or more, of the same widths.

    Layers that are new come after the old ones on the way down, and before the last one on the
    way up, where the maps come from that they left; transformer blocks come after the old ones.
    Raises `SystemExit` where it has no place for some weight.
    """
    grown, taken = unet.state_dict(), set()
    names = former_names(grown, former)
    for name, value in grown.items():
        before = names.get(name)
        if before is not None and former[before].shape == value.shape:
            value.copy_(former[before])
            taken.add(before)
        elif name.endswith("conv_shortcut.weight"):
            # Map and skip lie one after the other: the first goes on, the second is left.
            value.copy_(torch.eye(*value.shape[:2])[:, :, None, None])
        elif _ENDS.search(name) or name.endswith("conv_shortcut.bias"):
            value.zero_()
    if missing := sorted(former.keys() - taken):
        raise SystemExit(f"the UNet to begin has no place for {missing[0]}: only depth may grow")


def former_names(grown: Collection[str], former: Collection[str]) -> dict[str, str]:
    """Return by the names of the deeper network those of the shallower one, where it had them."""
    last = {side: _last_layer(former, side) for side in ("down", "up")}
    more = _last_layer(grown, "up") - last["up"]
    found = {}
    for name in grown:
        before = name
        if place := _PLACE.match(name):
            side, layer = place[1], int(place["layer"])
            if side == "up" and more and layer >= last[side]:
                # The last one takes a map of the finer level, and those before it are new.
                layer = last[side] if layer == last[side] + more else -1
            start, end = place.span("layer")
            before = f"{name[:start]}{layer}{name[end:]}"
        if before in former:
            found[name] = before
    return found


def _last_layer(names: Collection[str], side: str) -> int:
    places = [_PLACE.match(name) for name in names]
    return max(int(found["layer"]) for found in places if found and found[1] == side)
