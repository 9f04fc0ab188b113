"""Keep what was put into a generator beside its own weights: LoRAs and learned words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.errors import BadInput, DiptychError, UnsupportedModel
from diptych.runtimes.network import OpenNetworks
from diptych.text import ClipTokenizer

if TYPE_CHECKING:
    from torch import nn

    from diptych.weights.adapters import EmbeddingHandle, LoraHandle

__all__ = ["Adapters"]


class Adapters:
    """Put LoRAs and learned words into networks, and take them out again.

    `tokenizers` are those of the generator, with the learned words.
    """

    def __init__(
        self, networks: OpenNetworks, tokenizers: Mapping[str, ClipTokenizer], name: str
    ) -> None:
        self._networks, self._plain, self._name = networks, dict(tokenizers), name
        self.tokenizers = dict(tokenizers)
        self._loras: list[LoraHandle] = []
        self._learned: dict[str, EmbeddingHandle] = {}

    @property
    def state(self) -> tuple[object, ...]:
        """Return what tells one state from another: words encoded in one hold there only."""
        loras = tuple((each.number, each.scale) for each in self._at_work())
        return (loras, tuple(each.number for each in self._learned.values()))

    @property
    def label(self) -> str:
        """Name the model and its LoRAs with their scales: both belong to a picture's recipe."""
        loras = [f"{each.path.stem}:{each.scale:g}" for each in self._at_work()]
        return " + ".join([self._name, *loras])

    def load_lora(self, path: str | Path, scale: float, *, fused: bool) -> LoraHandle:
        from diptych.weights.adapters import apply_lora

        handle = apply_lora(self._modules("a LoRA"), path, scale, fused)
        self._loras.append(handle)
        return handle

    def unload_lora(self, handle: LoraHandle | None) -> None:
        for each in list(reversed(self._loras)):
            if handle is None or each is handle:
                each.remove()
                self._loras.remove(each)

    def _at_work(self) -> list[LoraHandle]:
        """Return the LoRAs that were not removed by their handles."""
        return [each for each in self._loras if each.updates]

    def learn(self, path: str | Path, token: str | None) -> str:
        from diptych.weights.adapters import add_embedding

        handle = add_embedding(self._modules("a learned word"), path, token)
        try:
            if handle.token in self._learned:
                raise BadInput(f"{handle.token!r} is loaded already: give token= another name")
            self._set_learned({**self._learned, handle.token: handle})
        except DiptychError:
            handle.remove()
            raise
        return handle.token

    def forget(self, token: str | None) -> None:
        if token is not None and token not in self._learned:
            known = ", ".join(self._learned) or "none"
            raise BadInput(f"{token!r} is no learned word that is loaded; there are: {known}")
        forgotten = list(self._learned) if token is None else [token]
        for each in reversed(forgotten):
            self._learned[each].remove()
        self._set_learned({t: h for t, h in self._learned.items() if t not in forgotten})

    def _set_learned(self, learned: dict[str, EmbeddingHandle]) -> None:
        tokenizers = dict(self._plain)
        for name, tokenizer in self._plain.items():
            encoder = name.replace("tokenizer", "text_encoder")
            words = {token: handle.ids[encoder] for token, handle in learned.items()}
            tokenizers[name] = tokenizer.with_placeholders(words)
        self.tokenizers, self._learned = tokenizers, learned

    def _modules(self, what: str) -> Mapping[str, nn.Module]:
        if self._networks.modules is None:
            raise UnsupportedModel(
                f"{self._name} runs in {self._networks.runtime}, where {what} cannot be "
                "loaded: load the generator with runtime='torch'"
            )
        return self._networks.modules
