"""What keeps a training small."""

from __future__ import annotations

import os

import pytest

from diptych.training.memory import bound_kernel_cache


def test_kernels_are_bounded_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    bound_kernel_cache()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    bound_kernel_cache()
    assert os.environ[name] == "64"
