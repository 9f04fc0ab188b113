"""Write the layers that networks are made of into an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diptych.errors import UnsupportedModel
from diptych.runtimes.graph import Graph, Weights

__all__ = ["LayerWriter"]

_BATCH_NORM_EPS = 1e-5  # torch's default, which the model keeps


@dataclass(frozen=True, slots=True)
class LayerWriter:
    """Write layers into a graph, taking the weights of the module at a path."""

    graph: Graph
    source: Weights

    def weight(self, path: str) -> str:
        return self.graph.weight(path, self.source[path])

    def matmul(self, hidden: str, path: str, rows: slice = slice(None)) -> str:
        """Multiply as the Linear at `path` does, or as those `rows` of its weight."""
        # torch keeps [out, in]; MatMul wants [in, out].
        kernel = self.source[f"{path}.weight"][rows]
        kernel = kernel.reshape(kernel.shape[:2]).T  # a 1x1 convolution is a matrix, too
        name = f"{path}.weight" if rows == slice(None) else f"{path}.weight.{rows.start}"
        return self.graph.add("MatMul", hidden, self.graph.weight(name, kernel))

    def linear(self, hidden: str, path: str, rows: slice = slice(None), to: str = "") -> str:
        name = f"{path}.bias" if rows == slice(None) else f"{path}.bias.{rows.start}"
        bias = self.graph.weight(name, self.source[f"{path}.bias"][rows])
        return self.graph.add("Add", self.matmul(hidden, path, rows), bias, to=to)

    def norm(self, hidden: str, path: str, eps: float, to: str = "") -> str:
        # Apart from the sum before it: `SkipLayerNormalization` does both, in four times the time.
        scale, bias = self.weight(f"{path}.weight"), self.weight(f"{path}.bias")
        return self.graph.add("LayerNormalization", hidden, scale, bias, to=to, epsilon=eps)

    def activate(self, hidden: str, bias: str, act: str) -> str:
        """Add `bias` and bend: erf-GELU and tanh-GELU are kept apart."""
        fused = {"gelu": ".BiasGelu", "gelu_new": ".FastGelu", "gelu_pytorch_tanh": ".FastGelu"}
        if act in fused:
            return self.graph.add(fused[act], hidden, self.weight(bias))
        total = self.graph.add("Add", hidden, self.weight(bias))
        if act == "relu":
            return self.graph.add("Relu", total)
        slopes = {"quick_gelu": 1.702, "silu": 1.0, "swish": 1.0}
        if act not in slopes:
            raise UnsupportedModel(f"the activation {act!r} cannot be exported")
        return self.graph.add(".QuickGelu", total, alpha=slopes[act])

    def group_norm(self, pixels: str, path: str, groups: int, eps: float) -> str:
        """Norm each group of channels of [B, C, h, w] over all its pixels."""
        graph, channels = self.graph, len(self.source[f"{path}.weight"])
        # As one channel each, groups are what the runtime knows as instances.
        grouped = graph.add("Reshape", pixels, graph.ints(0, groups, -1))
        ones = graph.weight(f"ones.{groups}", np.ones(groups, np.float32))
        zeros = graph.weight(f"zeros.{groups}", np.zeros(groups, np.float32))
        normed = graph.add("InstanceNormalization", grouped, ones, zeros, epsilon=eps)
        normed = graph.add("Reshape", normed, graph.add("Shape", pixels))
        for op, name in (("Mul", "weight"), ("Add", "bias")):
            values = self.source[f"{path}.{name}"].reshape(channels, 1, 1)
            normed = graph.add(op, normed, graph.weight(f"{path}.{name}", values))
        return normed

    def silu(self, hidden: str) -> str:
        return self.graph.add(".QuickGelu", hidden, alpha=1.0)

    def conv(
        self,
        pixels: str,
        path: str,
        *,
        norm: str = "",
        stride: int = 1,
        pad: int | tuple[int, int, int, int] = 0,
        to: str = "",
    ) -> str:
        """Convolve; the batch norm at `norm` is folded into the kernel.

        `pad` is for all sides, or for top, left, bottom and right.
        """
        kernel = self.source[f"{path}.weight"]
        if norm:
            scale, shift, mean, variance = (
                self.source[f"{norm}.{name}"]
                for name in ("weight", "bias", "running_mean", "running_var")
            )
            factor = scale / np.sqrt(variance + np.float32(_BATCH_NORM_EPS))
            kernel, bias = kernel * factor[:, None, None, None], shift - mean * factor
        else:
            bias = self.source[f"{path}.bias"]
        weights = (
            self.graph.weight(f"{path}.weight", kernel),
            self.graph.weight(f"{path}.bias", bias),
        )
        strides, pads = [stride, stride], [pad] * 4 if isinstance(pad, int) else [*pad]
        return self.graph.add("Conv", pixels, *weights, strides=strides, pads=pads, to=to)
