"""Begin a deeper UNet as one that does what a shallower one does (Chen et al. 2016, Net2Net)."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
    more = {side: _layers(grown, side) - _layers(former, side) for side in ("down", "up")}
    for name, value in grown.items():
        before = _former_name(name, more, former)
        if before is not None and before in former and former[before].shape == value.shape:
            value.copy_(former[before])
            taken.add(before)
        elif name.endswith("conv_shortcut.weight"):
            # Map and skip lie one after the other: the first goes on, the second is left.
            value.copy_(torch.eye(*value.shape[:2])[:, :, None, None])
        elif _ENDS.search(name) or name.endswith("conv_shortcut.bias"):
            value.zero_()
    if missing := sorted(former.keys() - taken):
        raise SystemExit(f"the UNet to begin has no place for {missing[0]}: only depth may grow")


def _layers(state: Mapping[str, Tensor], side: str) -> int:
    """Return how many layers each level has on one side."""
    places = [_PLACE.match(name) for name in state]
    return 1 + max(int(found["layer"]) for found in places if found and found[1] == side)


def _former_name(name: str, more: Mapping[str, int], former: Mapping[str, Tensor]) -> str | None:
    """Return what a weight was called before there were `more` layers; None for one of these."""
    if (place := _PLACE.match(name)) is None:
        return name
    layer, last = int(place["layer"]), _layers(former, place[1]) - 1
    if place[1] == "up" and layer == last + more["up"]:
        layer = last  # the last one takes a map of the finer level
    elif layer > last or (place[1] == "up" and layer == last and more["up"]):
        return None
    start, end = place.span("layer")
    return f"{name[:start]}{layer}{name[end:]}"
