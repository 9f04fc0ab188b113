"""Join a ViT, a bridge and a GPT-2 into one captioner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.models.gpt2 import CrossAttentionBridge, Gpt2, Gpt2Config, PrefixBridge
from diptych.models.vit import ViT, ViTConfig

__all__ = ["Bridge", "VisionEncoderDecoder", "VisionEncoderDecoderConfig"]

Bridge = Literal["cross-attention", "prefix"]


@dataclass(frozen=True, slots=True)
class VisionEncoderDecoderConfig:
    """Describe a captioner; the defaults are `nlpconnect/vit-gpt2-image-captioning`."""

    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: Gpt2Config = field(default_factory=Gpt2Config)
    bridge: Bridge = "cross-attention"

    @property
    def num_image_tokens(self) -> int:
        return self.encoder.num_tokens

    @classmethod
    def tiny(cls) -> VisionEncoderDecoderConfig:
        return cls(ViTConfig.tiny(), Gpt2Config.tiny())


class VisionEncoderDecoder(nn.Module):
    """Caption pictures: `encode` once, then `step` word by word."""

    def __init__(self, config: VisionEncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(config.encoder)
        self.decoder = Gpt2(config.decoder)
        widths = config.encoder.hidden_size, config.decoder.hidden_size
        self.bridge: nn.Module
        if config.bridge == "prefix":
            self.bridge = PrefixBridge(*widths, config.decoder.layer_norm_eps)
        else:
            self.bridge = CrossAttentionBridge(*widths)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Map [B, C, H, W] to `cross_key_values` or `prefix_embeds`, whichever the bridge gives."""
        return self.connect(self.encoder(pixel_values))

    def connect(self, encoder_hidden_states: Tensor) -> Tensor:
        """Map what the encoder says, [B, P, D], to what `encode` gives."""
        bridged: Tensor = self.bridge(encoder_hidden_states)
        return bridged if self.config.bridge == "prefix" else self.decoder.cross_key_values(bridged)

    def step(
        self,
        input_ids: Tensor,
        bridged: Tensor | None,
        past_key_values: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the next word's `logits` [N, V], the cache and `image_attention` [N, T, P].

        `bridged` is what `encode` gave; with the prefix bridge it is given in the first call only.
        """
        hidden, present, weights = self._decode(input_ids, bridged, past_key_values, need_weights)
        seen = self._image_attention(weights, input_ids.shape[1]) if need_weights else None
        return self.decoder.logits(hidden[:, -1]), present, seen

    def step_in_place(
        self, input_ids: Tensor, cross: Tensor | None, cache: Tensor, position: Tensor
    ) -> Tensor:
        """Return the logits [N, V] behind `input_ids` [N, 1]; see `position` of `Gpt2.forward`.

        `cross` is what `encode` gave, None with the prefix bridge: the picture is in the cache.
        """
        hidden, _, _ = self.decoder(input_ids, cache, cross, position=position)
        return self.decoder.logits(hidden[:, -1])

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Return the logits [B, T, V] behind every word of `input_ids` [B, T], for training."""
        return self.score(self.encode(pixel_values), input_ids)

    def score(self, bridged: Tensor, input_ids: Tensor) -> Tensor:
        """Return the logits [B, T, V] behind every word, of pictures that are encoded already."""
        hidden, _, _ = self._decode(input_ids, bridged, None, False)
        return self.decoder.logits(hidden[:, -input_ids.shape[1] :])

    def _decode(
        self,
        input_ids: Tensor,
        bridged: Tensor | None,
        past_key_values: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        prefix = self.config.bridge == "prefix"
        hidden: tuple[Tensor, Tensor, list[Tensor]] = self.decoder(
            input_ids,
            past_key_values,
            cross_key_values=None if prefix else bridged,
            prefix_embeds=bridged if prefix else None,
            need_weights=need_weights,
        )
        return hidden

    def _image_attention(self, weights: list[Tensor], new: int) -> Tensor:
        # One map a word: the mean over layers and heads of what falls on the picture's tokens.
        stacked = torch.stack([layer.mean(1) for layer in weights]).mean(0)
        return stacked[:, -new:, : self.config.num_image_tokens]
