"""Write words after a picture: GPT-2, with the two bridges that bring the picture in.

`cross-attention`: every layer looks at the picture's tokens through keys and values that are
computed once a picture. `prefix`: the picture's tokens stand before the words, and the decoder is
a plain GPT-2. The caches are tensors that go in and come out; nothing is hidden in the module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.models.layers import ACTIVATIONS, attention, causal_mask

__all__ = ["INPUTS", "OUTPUTS", "CrossAttentionBridge", "Gpt2", "Gpt2Config", "PrefixBridge"]

# The rows N are B pictures times the beams of each, neighbours in that order.
INPUTS = {
    "input_ids": "N T",
    "past_key_values": "L 2 N heads S d",
    "cross_key_values": "L 2 B heads P d",  # bridge cross-attention
    "prefix_embeds": "N P D",  # bridge prefix: P tokens in the first call, 0 afterwards
}
OUTPUTS = {
    "logits": "N V",
    "present_key_values": "L 2 N heads S+T d",
    "image_attention": "N T P",
}


@dataclass(frozen=True, slots=True)
class Gpt2Config:
    """Describe a GPT-2; the defaults are `gpt2` with cross-attention."""

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    add_cross_attention: bool = True
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    dropout: float = 0.0

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def attention_scale(self, layer: int) -> float:
        """Return what the scores of `layer` (from 0) are multiplied by."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def tiny(cls) -> Gpt2Config:
        return cls(
            vocab_size=99,
            max_position_embeddings=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )


class Gpt2(nn.Module):
    """Predict the next word (Radford et al. 2019)."""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Tensor | None = None,
        cross_key_values: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        need_weights: bool = False,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run `input_ids` [N, T], behind `prefix_embeds` [N, P, D] where given.

        `past_key_values` [L, 2, N, heads, S, d] and `cross_key_values` [L, 2, B, heads, P, d] are
        as in `INPUTS`. Returns the hidden states [N, P + T, D], the grown cache, and a list, empty
        unless `need_weights`, of each layer's weights: [N, heads, T, P] on the picture with
        cross-attention, else [N, heads, P + T, S + P + T] on everything before.

        With `position` [1], a whole number, T is 1 and the cache has room for S words, of which
        as many are there: it is written in place, and given back as it is.
        """
        hidden = self.wte(input_ids)
        if prefix_embeds is not None:
            hidden = torch.cat([prefix_embeds.to(hidden.dtype), hidden], dim=1)
        new = hidden.shape[1]
        past = 0 if past_key_values is None else past_key_values.shape[4]
        positions = position
        if positions is None:
            positions = torch.arange(past, past + new, device=hidden.device)
        hidden = self.drop(hidden + self.wpe(positions))
        mask = None if new == 1 else causal_mask(new, past + new, hidden.device)
        if position is not None:
            mask = torch.arange(past, device=hidden.device)[None, :] <= position
        present, weights = [], []
        # Unbound: the gradient of a slice would be as large as the whole cache, layer for layer.
        pasts = [None] * len(self.h) if past_key_values is None else past_key_values.unbind()
        for layer, block in enumerate(self.h):
            hidden, key_values, seen = block(
                hidden,
                mask,
                pasts[layer],
                None if cross_key_values is None else cross_key_values[layer],
                need_weights,
                position,
            )
            present.append(key_values)
            weights.append(seen)
        whole = past_key_values if position is not None else None
        cache = torch.stack(present) if whole is None else whole
        return self.ln_f(hidden), cache, weights if need_weights else []

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every word: [..., D] to [..., V]."""
        if self.lm_head is None:
            return F.linear(hidden, self.wte.weight)
        scores: Tensor = self.lm_head(hidden)
        return scores

    def cross_key_values(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project the picture [B, P, D] for all layers at once: [L, 2, B, heads, P, d]."""
        each: list[Tensor] = []
        for block in self.h:
            assert isinstance(block, Block)
            assert block.crossattention is not None
            each.append(block.crossattention.key_values(encoder_hidden_states))
        return torch.stack(each)


class Block(nn.Module):
    """Apply self-attention, cross-attention where there is one, and the MLP."""

    def __init__(self, config: Gpt2Config, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        scale = config.attention_scale(layer)
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = SelfAttention(width, config.num_attention_heads, scale, config.dropout)
        self.crossattention: CrossAttention | None = None
        if config.add_cross_attention:
            self.ln_cross_attn = nn.LayerNorm(width, eps)
            self.crossattention = CrossAttention(
                width, config.num_attention_heads, scale, config.dropout
            )
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, config.intermediate_size, config.hidden_act, config.dropout)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        past: Tensor | None,
        cross: Tensor | None,
        need_weights: bool,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mixed, present, weights = self.attn(self.ln_1(hidden), mask, past, need_weights, position)
        hidden = hidden + mixed
        if self.crossattention is not None and cross is not None:
            mixed, weights = self.crossattention(self.ln_cross_attn(hidden), cross, need_weights)
            hidden = hidden + mixed
        return hidden + self.mlp(self.ln_2(hidden)), present, weights


class SelfAttention(nn.Module):
    """Look back at the words (and prefix) so far."""

    def __init__(self, width: int, num_heads: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dropout = num_heads, scale, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        past: Tensor | None,
        need_weights: bool,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        query, key, value = (
            split_heads(part, self.num_heads) for part in self.c_attn(hidden).chunk(3, dim=-1)
        )
        present = torch.stack([key, value])
        if past is not None and position is not None:
            present = past.index_copy_(3, position, present)
        elif past is not None:
            present = torch.cat([past.to(present.dtype), present], dim=3)
        mixed, weights = attention(
            query,
            *present.unbind(),
            scale=self.scale,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        return self.drop(self.c_proj(mixed.transpose(1, 2).flatten(2))), present, weights


class CrossAttention(nn.Module):
    """Look at the picture; the beams of one picture share its keys and values."""

    def __init__(self, width: int, num_heads: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dropout = num_heads, scale, dropout
        self.q_attn = nn.Linear(width, width)
        self.c_attn = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def key_values(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project [B, P, D] to [2, B, heads, P, d]."""
        key, value = self.c_attn(encoder_hidden_states).chunk(2, dim=-1)
        return torch.stack([split_heads(part, self.num_heads) for part in (key, value)])

    def forward(
        self, hidden: Tensor, cross: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, new, width = hidden.shape
        pictures = cross.shape[1]
        # The beams become further queries of their picture: its keys are read once, not per beam.
        query = split_heads(self.q_attn(hidden).reshape(pictures, -1, width), self.num_heads)
        mixed, weights = attention(
            query,
            cross[0].to(query.dtype),
            cross[1].to(query.dtype),
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        mixed = mixed.transpose(1, 2).reshape(rows, new, width)
        if weights is not None:
            weights = weights.transpose(1, 2).reshape(rows, new, self.num_heads, -1).transpose(1, 2)
        return self.drop(self.c_proj(mixed)), weights


class Mlp(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, intermediate_size)
        self.act = ACTIVATIONS[hidden_act]
        self.c_proj = nn.Linear(intermediate_size, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        narrowed: Tensor = self.drop(self.c_proj(self.act(self.c_fc(hidden))))
        return narrowed


class CrossAttentionBridge(nn.Module):
    """Bring the picture's vectors to the decoder's width where the two differ."""

    def __init__(self, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.enc_to_dec_proj: nn.Linear | None = None
        if encoder_width != decoder_width:
            self.enc_to_dec_proj = nn.Linear(encoder_width, decoder_width)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        """Map [B, P, D of the encoder] to [B, P, D of the decoder]."""
        if self.enc_to_dec_proj is None:
            return encoder_hidden_states
        projected: Tensor = self.enc_to_dec_proj(encoder_hidden_states)
        return projected


class PrefixBridge(nn.Module):
    """Map the picture's vectors into the space of word embeddings: one Linear and a LayerNorm."""

    def __init__(self, encoder_width: int, decoder_width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.projection = nn.Linear(encoder_width, decoder_width)
        self.layer_norm = nn.LayerNorm(decoder_width, layer_norm_eps)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        """Map [B, P, D of the encoder] to `prefix_embeds` [B, P, D of the decoder]."""
        normed: Tensor = self.layer_norm(self.projection(encoder_hidden_states))
        return normed


def split_heads(hidden: Tensor, num_heads: int) -> Tensor:
    """Turn [N, T, D] into [N, heads, T, d]."""
    rows, new, width = hidden.shape
    return hidden.view(rows, new, num_heads, width // num_heads).transpose(1, 2)
