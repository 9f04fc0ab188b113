"""Write captions on a GPU by CUDA graphs: a word is one launch, and the cache never moves.

A step of GPT-2 is some 300 small kernels, which Python launches far more slowly than they run. A
graph needs tensors that stay where they are, so the cache has room for words to come, and rows of
pictures that are done go on in vain.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.runtimes.on_torch import ChoosingDecoder, TorchEncoder
from diptych.runtimes.on_torch_recorded import RecordedNetwork, Recording, has_room, laid_out, warn

__all__ = ["HoldingDecoder", "RecordedEncoder"]

_ROOM = 32  # words by which a cache grows
_BEST = 64  # words that are ranked in each row; more are asked for seldom
_MOST = 6  # kinds of search that are kept

Key = tuple[Any, ...]


class RecordedEncoder(TorchEncoder):
    """Run an encoder on a GPU, and what follows it, as one CUDA graph a shape."""

    def __init__(
        self, module: VisionEncoderDecoder, record: Callable[..., Any] = Recording
    ) -> None:
        super().__init__(module)
        self._recorded = RecordedNetwork(_run_encoder, record)

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self._recorded(self._module, {"pixel_values": pixel_values})


def _run_encoder(module: Any, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return (module.encode(arrays["pixel_values"]),)


class HoldingDecoder(ChoosingDecoder):
    """Run a decoder on a GPU; from the second search of a kind on, by CUDA graphs.

    Two searches at once have a cache each. What was recorded is forgotten as soon as weights lie
    elsewhere. Where recording fails, words are written as before.
    """

    def __init__(
        self, module: VisionEncoderDecoder, record: Callable[..., Any] = Recording
    ) -> None:
        super().__init__(module)
        self._record = record
        self._kept: dict[Key, list[_Cache]] = {}
        self._asked: set[Key] = set()
        self.state: list[Any] = []  # where the weights lie
        self.fails = False

    @torch.inference_mode()
    def hold(self, past_key_values: Tensor, bridged: Any, images: int) -> _Search | None:
        """Take over a search, as `HoldingNetwork.hold` says."""
        device = past_key_values.device
        if self.fails or torch.is_autocast_enabled(device.type) or not has_room(device):
            return None
        if (state := laid_out(self._module)) != self.state:
            self.forget()
            self.state = state
        cross = None if bridged is None else bridged.to(past_key_values.dtype)
        key = _key(past_key_values, cross, _rounded(past_key_values.shape[4] + 1))
        if key not in self._asked:
            self._asked.add(key)
            return None
        return _Search(self, key, past_key_values, cross, images)

    def forget(self) -> None:
        """Give back all that is recorded."""
        self._kept.clear()
        self._asked.clear()

    def take(self, key: Key, past: Tensor, cross: Tensor | None) -> _Cache:
        """Return a cache of a kind that no search has, with these words and pictures in it."""
        free = self._kept.pop(key, [])
        cache = free.pop() if free else _Cache(self, self._module, key, past, cross)
        if free:
            self._kept[key] = free
        cache.fill(past, cross)
        return cache

    def give_back(self, key: Key, cache: _Cache, state: list[Any]) -> None:
        """Keep a cache for searches to come, unless the weights it was recorded with are gone."""
        if self.fails or state is not self.state:
            return
        self._kept.setdefault(key, []).append(cache)
        while sum(map(len, self._kept.values())) > _MOST:
            oldest = next(iter(self._kept))
            self._kept[oldest].pop(0)
            if not self._kept[oldest]:
                del self._kept[oldest]

    def record(self, call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Any:
        """Return a recording of `call`; None where that fails, of which a warning tells once."""
        try:
            return self._record(call, inputs)
        except RuntimeError as error:
            if not self.fails:
                warn(error)
            self.fails = True
            return None


class _Search:
    """Serve one search: each row it goes on with has a place in the cache, by its picture."""

    def __init__(
        self, decoder: HoldingDecoder, key: Key, past: Tensor, cross: Tensor | None, images: int
    ) -> None:
        self._decoder, self._cross = decoder, cross
        self._rows, self._each = past.shape[2], past.shape[2] // images
        self._length = past.shape[4]
        self._places = np.arange(self._rows)
        self._take(key, past)

    def logits(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """Feed tokens, as `HeldSearch.logits` says."""
        _, logits = self._advance(token_ids, parents)
        whole: NDArray[np.float32] = logits.cpu().numpy()[self._places]
        return whole

    @torch.inference_mode()
    def best(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Feed tokens, as `HeldSearch.best` says."""
        told, logits = self._advance(token_ids, parents)
        ranked = (told.shape[1] - 1) // 2
        count = min(count, logits.shape[1])
        if count > ranked:
            told, ranked = _told(logits, count), count
        found = told.cpu().numpy()[self._places]
        return (
            found[:, :count].astype(np.int64),
            found[:, ranked : ranked + count],
            found[:, -1],
        )

    @torch.inference_mode()
    def _advance(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None
    ) -> tuple[Tensor, Tensor]:
        fed, follow = np.zeros(self._rows, np.int64), np.arange(self._rows)
        if parents is not None:
            before = self._places[parents]
            pictures = before // self._each
            # Rows of a picture are neighbours, and as many as ever: the first has the first place.
            self._places = pictures * self._each + np.arange(len(parents)) % self._each
            follow[self._places] = before
        fed[self._places] = token_ids[:, 0]
        if self._length == self._cache.room:
            self._grow()
        made = self._cache.step(fed, follow, self._length)
        self._length += 1
        return made

    def _grow(self) -> None:
        past = self._cache.words(self._length)
        self._release()
        self._take(_key(past, self._cross, _rounded(self._length + 1)), past)

    def _take(self, key: Key, past: Tensor) -> None:
        decoder = self._decoder
        self._cache = decoder.take(key, past, self._cross)
        # Searches do not say that they are over: what nobody asks any more is.
        self._release = weakref.finalize(self, decoder.give_back, key, self._cache, decoder.state)


class _Cache:
    """Hold tensors that stay where they are, and the graphs that read and write them."""

    def __init__(
        self,
        decoder: HoldingDecoder,
        module: VisionEncoderDecoder,
        key: Key,
        past: Tensor,
        cross: Tensor | None,
    ) -> None:
        self._decoder, self._module = decoder, module
        *_, self.room = key
        layers, two, rows, heads, _, width = past.shape
        self._words = past.new_zeros(layers, two, rows, heads, self.room, width)
        self._cross = None if cross is None else torch.empty_like(cross)
        self._rows = rows
        self._calls = {False: 0, True: 0}
        self._recorded: dict[bool, Any] = {}
        # Pinned, so that sending it does not wait for the card.
        self._sent = torch.empty(2 * rows + 1, dtype=torch.int64, pin_memory=past.is_cuda)

    def fill(self, past: Tensor, cross: Tensor | None) -> None:
        """Take the words [L, 2, N, heads, S, d] and pictures of a search that begins."""
        self._words[:, :, :, :, : past.shape[4]] = past
        if self._cross is not None and cross is not None:
            self._cross.copy_(cross)

    def words(self, length: int) -> Tensor:
        """Return a copy of the first `length` words."""
        return self._words[:, :, :, :, :length].clone()

    def step(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64], position: int
    ) -> tuple[Tensor, Tensor]:
        """Write one word into every row; the next call overwrites what this one returns."""
        follows = bool((parents != np.arange(self._rows)).any())
        self._sent.copy_(torch.from_numpy(np.concatenate([token_ids, parents, [position]])))
        self._calls[follows] += 1
        if follows in self._recorded:
            told, logits = self._recorded[follows].replay((self._sent,))
            return told, logits
        inputs = (self._sent.to(self._words.device),)
        if self._calls[follows] > 1 and not self._decoder.fails:
            recording = self._decoder.record(self._following if follows else self._staying, inputs)
            if recording is not None:
                self._recorded[follows] = recording
                told, logits = recording.first()
                return told, logits
        return self._run(follows, *inputs)

    def _following(self, sent: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(True, sent)

    def _staying(self, sent: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(False, sent)

    def _run(self, follows: bool, sent: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows
        token_ids, parents, position = sent[:rows], sent[rows:-1], sent[-1:]
        if follows:
            self._words.copy_(self._words.index_select(2, parents))
        logits = self._module.step_in_place(
            token_ids[:, None], self._cross, self._words, position
        ).float()
        return _told(logits, min(_BEST, logits.shape[1])), logits


def _told(logits: Tensor, count: int) -> Tensor:
    """Return the best words [N, 2 K + 1]: their ids, their logits, the sum; one transfer."""
    values, token_ids = logits.topk(count, dim=1)
    log_sums = (logits - values[:, :1]).exp().sum(dim=1, keepdim=True).log()
    # float32 holds every whole number up to 2 ** 24.
    return torch.cat([token_ids.float(), values, log_sums], dim=1)


def _key(past: Tensor, cross: Tensor | None, room: int) -> Key:
    layers, two, rows, heads, _, width = past.shape
    pictures = None if cross is None else cross.shape
    return (layers, two, rows, heads, width, past.dtype, pictures, room)


def _rounded(length: int) -> int:
    return -(-length // _ROOM) * _ROOM
