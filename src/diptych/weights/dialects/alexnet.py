"""Names of torchvision's AlexNet, of which the convolutions are kept."""

from __future__ import annotations

from collections.abc import Mapping

from diptych.weights.rename import Pairs, Reshape, Rules

__all__ = ["ALIASES", "NAME", "RESHAPE", "RULES", "TELLTALE", "TENSORS"]

NAME = "torchvision's AlexNet"
TELLTALE = "features.0.weight"
ALIASES: Pairs = ()
RULES: Rules = (("features.{}", "features.{}"), ("classifier.{}", None))
TENSORS: Rules = ()
RESHAPE: Mapping[str, Reshape] = {}
