"""What is kept on the disk comes back to the bit, or is made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diptych.training.cache import TensorCache, cache_key


def test_it_computes_once(tmp_path: Path) -> None:
    made = []

    def compute() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}

    key = cache_key(picture="x", size=(3, 4))
    first = TensorCache(tmp_path).get(key, compute)
    second = TensorCache(tmp_path).get(key, compute)
    assert len(made) == 1
    for name, tensor in compute().items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor)
        assert second[name].dtype == tensor.dtype


def test_keys_tell_settings_apart() -> None:
    keys = {cache_key(a=1, b=2), cache_key(a=2, b=1), cache_key(a=1), cache_key(a="1", b=2)}
    assert len(keys) == 4
    assert cache_key(a=1, b=2) == cache_key(b=2, a=1)


@pytest.mark.parametrize("position", [0, 9, -1])
def test_damage_is_repaired(
    tmp_path: Path, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)
    wanted = cache.get("ab", lambda: {"a": torch.arange(64.0)})
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[position] ^= 0x15
    path.write_bytes(data)
    again = cache.get("ab", lambda: {"a": torch.arange(64.0)})
    assert torch.equal(again["a"], wanted["a"])
    assert "is damaged" in caplog.text
    caplog.clear()
    cache.get("ab", dict)
    assert not caplog.records


def test_a_full_disk_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = TensorCache(tmp_path)
    for key in ("ab", "cd"):
        assert torch.equal(cache.get(key, lambda: {"a": torch.ones(2)})["a"], torch.ones(2))
    assert len(caplog.records) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
