"""Write what the networks of a generator have in common: residual blocks, attention, maps."""

from __future__ import annotations

from diptych.runtimes.graph import Graph
from diptych.runtimes.graph_layers import LayerWriter

__all__ = ["Style", "attend", "repeat_pixels", "resnet", "to_map", "to_tokens", "unsqueeze"]

Style = tuple[str, str, str, str]
"""Rows of keys, rows of queries, share of the query, temperature of one layer."""


def resnet(
    write: LayerWriter, hidden: str, path: str, groups: int, eps: float, time: str = ""
) -> str:
    """Write two normed convolutions beside the input; `time` [B, width] joins between them."""
    graph, residual = write.graph, hidden
    hidden = write.silu(write.group_norm(hidden, f"{path}.norm1", groups, eps))
    hidden = write.conv(hidden, f"{path}.conv1", pad=1)
    if time:
        added = write.linear(time, f"{path}.time_emb_proj")
        added = graph.add("Unsqueeze", added, graph.ints(2, 3))
        hidden = graph.add("Add", hidden, added)
    hidden = write.silu(write.group_norm(hidden, f"{path}.norm2", groups, eps))
    hidden = write.conv(hidden, f"{path}.conv2", pad=1)
    if f"{path}.conv_shortcut.weight" in write.source:
        residual = write.conv(residual, f"{path}.conv_shortcut")
    return graph.add("Add", hidden, residual)


def attend(
    write: LayerWriter,
    hidden: str,
    context: str,
    path: str,
    heads: int,
    style: Style | None = None,
) -> str:
    """Write attention of `hidden` [B, T, D] to `context` [B, S, E]; `style` as in the module."""
    parts = []
    for name, seen in (("to_q", hidden), ("to_k", context), ("to_v", context)):
        has_bias = f"{path}.{name}.bias" in write.source
        parts.append((write.linear if has_bias else write.matmul)(seen, f"{path}.{name}"))
    if style is not None:
        graph, (key_rows, query_rows, share, temperature) = write.graph, style
        query = parts[0]
        difference = graph.add("Sub", graph.add("Gather", query, query_rows), query)
        query = graph.add("Add", query, graph.add("Mul", difference, share))
        parts = [
            graph.add("Mul", query, temperature),
            *(graph.add("Gather", each, key_rows) for each in parts[1:]),
        ]
    size = len(write.source[f"{path}.to_q.weight"]) // heads
    mixed = write.graph.add(".MultiHeadAttention", *parts, num_heads=heads, scale=size**-0.5)
    return write.linear(mixed, f"{path}.to_out.0")


def to_tokens(graph: Graph, pixels: str) -> str:
    """Turn [B, C, h, w] into [B, h*w, C]."""
    return graph.add(
        "Transpose", graph.add("Reshape", pixels, graph.ints(0, 0, -1)), perm=[0, 2, 1]
    )


def to_map(graph: Graph, tokens: str, like: str) -> str:
    """Turn [B, h*w, C] into the shape of `like`, [B, C, h, w]."""
    channels_first = graph.add("Transpose", tokens, perm=[0, 2, 1])
    return graph.add("Reshape", channels_first, graph.add("Shape", like))


def repeat_pixels(graph: Graph, pixels: str, *scales_or_sizes: str) -> str:
    """Write a larger map, each pixel as many times as it takes; as in `Resize`, scales or sizes."""
    return graph.add(
        "Resize",
        *(pixels, "", *scales_or_sizes),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def unsqueeze(graph: Graph, value: str, axis: int) -> str:
    """Write an axis of one."""
    return graph.add("Unsqueeze", value, graph.ints(axis))
