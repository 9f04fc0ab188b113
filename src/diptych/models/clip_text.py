"""Encode words for the generator: the text towers of CLIP and OpenCLIP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.models.fused_projections import FusedProjections
from diptych.models.layers import ACTIVATIONS, attention, causal_mask, split_heads

__all__ = ["INPUTS", "OUTPUTS", "ClipText", "ClipTextConfig"]

INPUTS = {"input_ids": "B T"}
OUTPUTS = {"encoder_hidden_states": "B T D", "pooled": "B D"}

_LEGACY_EOS = 2  # what old configs say; it was never the end of a text


@dataclass(frozen=True, slots=True)
class ClipTextConfig:
    """Describe a text tower; the defaults are CLIP ViT-L, the encoder of Stable Diffusion 1."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None  # None: the pooled vector stays as the last norm gives it
    eos_token_id: int = 49407  # 2: pool where the largest id stands
    output_layer: int = -1  # -2: the penultimate, SDXL
    output_norm: bool = True  # the final norm on what comes out; not for SDXL

    @classmethod
    def tiny(cls) -> ClipTextConfig:
        return cls(
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=999,
        )


class ClipText(nn.Module):
    """Encode token ids with a causal transformer (Radford et al. 2021).

    There is no padding mask: filler tokens take part, and the checkpoints rely on it.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection: nn.Linear | None = None
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor, clip_skip: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Map `input_ids` [B, T] to `encoder_hidden_states` [B, T, D] and `pooled` [B, D].

        `clip_skip` leaves out that many more layers at the end; it may be a tensor of no axes, so
        that an exported graph can take it. `pooled` always comes from the last layer.
        """
        states = self.text_model.hidden_states(input_ids)
        chosen = _pick(states, len(states) + self.config.output_layer - clip_skip)
        if self.config.output_norm:
            chosen = self.text_model.final_layer_norm(chosen)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        last = states[-1][rows, self._ends(input_ids)]
        pooled = self.text_model.final_layer_norm(last)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return chosen, pooled

    def _ends(self, input_ids: Tensor) -> Tensor:
        """Return where each text ends, [B]: its first end token."""
        if self.config.eos_token_id == _LEGACY_EOS:
            # Words that were added later have larger ids than the end token.
            own = input_ids < self.config.vocab_size
            return torch.where(own, input_ids, 0).argmax(-1)
        return (input_ids == self.config.eos_token_id).int().argmax(-1)


class TextModel(nn.Module):
    """Hold what published files keep under `text_model`."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(
            config.vocab_size, config.max_position_embeddings, config.hidden_size
        )
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Return the embeddings and every layer's output, each [B, T, D]."""
        hidden = self.embeddings(input_ids)
        words = input_ids.shape[1]
        mask = causal_mask(words, words, input_ids.device)
        states = [hidden]
        for layer in self.encoder.layers:
            hidden = layer(hidden, mask)
            states.append(hidden)
        return states


class Embeddings(nn.Module):
    """Add what a token means to where it stands; [B, T] to [B, T, D]."""

    def __init__(self, vocab_size: int, positions: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(positions, width)
        # PyTorch's own start, a deviation of 1, would drown what the layers add.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        words: Tensor = self.token_embedding(input_ids)
        return words + self.position_embedding.weight[: input_ids.shape[1]]


class Encoder(nn.Module):
    """Hold the transformer layers."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Apply one pre-norm block; [B, T, D] to [B, T, D]."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = Mlp(width, config.intermediate_size, config.hidden_act)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), mask)
        hidden = hidden + self.mlp(self.layer_norm2(hidden))
        return hidden


class SelfAttention(FusedProjections):
    """Let every token look at itself and those before it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def reading_one(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (split_heads(each, self.num_heads) for each in self.project(hidden))
        mixed, _ = attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.act = ACTIVATIONS[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        narrowed: Tensor = self.fc2(self.act(self.fc1(hidden)))
        return narrowed


def _pick(states: list[Tensor], index: int | Tensor) -> Tensor:
    if isinstance(index, Tensor):
        return torch.stack(states).index_select(0, index.reshape(1).long()).squeeze(0)
    return states[index]
