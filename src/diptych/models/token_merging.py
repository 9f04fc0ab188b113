"""Merge points of a map that are alike, so that self-attention has fewer of them to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TokenMerging"]

_SEED = 0


class TokenMerging:
    """Merge the share `ratio` of `tokens` [B, h*w, D] into those most alike, and undo it.

    One point of each 2 x 2 stays where it is, a seeded choice; of the others those go that are
    closest to such a point (Bolya and Hoffman 2023, Token Merging for Fast Stable Diffusion).
    `size` is (h, w), 2 or more; `ratio` 0 to 0.75: at most the three others of each four can go.
    """

    def __init__(self, tokens: Tensor, size: Sequence[int], ratio: float) -> None:
        self._fixed, self._others = _chosen(size, tokens.device)
        normed = F.normalize(tokens, dim=-1)
        scores = normed[:, self._others] @ normed[:, self._fixed].transpose(1, 2)
        likeness, nearest = scores.max(-1)
        order = likeness.argsort(dim=-1, descending=True, stable=True)
        count = min(len(self._others), int(tokens.shape[1] * ratio))
        self._going, self._staying = order[:, :count], order[:, count:]
        self._targets = nearest.gather(1, self._going)

    def merge(self, tokens: Tensor) -> Tensor:
        """Return [B, fewer, D]: those that stay, then the means of those that came together."""
        others = tokens[:, self._others]
        going, staying = _rows(others, self._going), _rows(others, self._staying)
        targets = self._targets[..., None].expand_as(going)
        means = tokens[:, self._fixed].scatter_reduce(1, targets, going, "mean")
        return torch.cat([staying, means], 1)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Return [B, h*w, D], each point with what it was merged into."""
        staying = tokens[:, : self._staying.shape[1]]
        means = tokens[:, self._staying.shape[1] :]
        both = torch.cat([_rows(means, self._targets), staying], 1)
        # Back from the order of likeness.
        places = torch.cat([self._going, self._staying], 1).argsort(1)
        whole = tokens.new_empty(len(tokens), len(self._fixed) + len(self._others), tokens.shape[2])
        whole[:, self._fixed] = means
        whole[:, self._others] = _rows(both, places)
        return whole


def _chosen(size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the places of the points that stay, one of each 2 x 2, and those of the others."""
    height, width = size
    # On the CPU, so that every device chooses alike.
    generator = torch.Generator().manual_seed(_SEED)
    corner = torch.randint(4, (height // 2, width // 2), generator=generator)
    down = 2 * torch.arange(height // 2)[:, None] + corner // 2
    across = 2 * torch.arange(width // 2)[None, :] + corner % 2
    is_fixed = torch.zeros(height * width, dtype=torch.bool)
    is_fixed[(down * width + across).flatten()] = True
    return is_fixed.nonzero()[:, 0].to(device), (~is_fixed).nonzero()[:, 0].to(device)


def _rows(tokens: Tensor, places: Tensor) -> Tensor:
    """Return the tokens at `places` [B, n]: [B, n, D]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))
