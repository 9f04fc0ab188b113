"""What every test stands on: fixed seeds, no network, one place for shared data."""

from __future__ import annotations

import importlib
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Read at import time by the libraries, so set before any of them is imported; subprocesses
# inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".pytest_cache" / "hypothesis"))

SEED = 20
THREADS = 2
NOT_OURS = (
    "torch._dynamo",
    "transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder",
    "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint",
)
SHARED_DATA = Path(os.environ.get("DIPTYCH_SHARED_DATA") or ROOT.parent / "shared" / "data")


def pytest_configure(config: pytest.Config) -> None:
    """Import what is not ours before coverage follows a worker: traced, it takes much longer."""
    if hasattr(config, "workerinput") and config.getoption("cov_source", None):
        for name in NOT_OURS:
            importlib.import_module(name)


class NetworkBlocked(RuntimeError):
    """Not an OSError: code that treats those as "offline" would hide the attempt."""


def _is_local(host: Any) -> bool:
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(os.fsdecode(host).partition("%")[0]).is_loopback
    except (TypeError, ValueError):
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Follow a test's first and last case for coverage: tracing all takes two thirds longer."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for several in cases.values():
        for item in several[1:-1]:
            item.add_marker("no_cover")


@pytest.fixture(autouse=True, scope="session")
def _measure() -> Iterator[Any]:
    """Spare exports, those of shared fixtures too, the two processes that measure them."""
    from diptych.runtimes import conversion

    measure = conversion._add_figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_add_figures", lambda *_: None)
        yield measure


@pytest.fixture(autouse=True)
def _figures(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _measure: Any
) -> None:
    """Let the tests about these figures have them."""
    if "figures" in request.keywords:
        monkeypatch.setattr("diptych.runtimes.conversion._add_figures", _measure)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Let sockets reach this machine only; names of other machines are not looked up either."""
    real_getaddrinfo = socket.getaddrinfo

    def guarded(real: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if isinstance(address, tuple) and not _is_local(address[0]):
                raise NetworkBlocked(f"a test tried to reach {address[0]}:{address[1]}")
            return real(self, address)

        return connect

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkBlocked(f"a test tried to look up {host}")
        return real_getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Seed every generator that a test may draw from. Torch only if something imported it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 -- the references draw from the legacy generator
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
        # A machine that is busy is better served by one: threads that wait for each other crawl.
        allowed = int(os.environ.get("OMP_NUM_THREADS") or THREADS)
        torch.set_num_threads(min(THREADS, allowed, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of data sets that are too large for the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared data here: set DIPTYCH_SHARED_DATA to its folder")
    return SHARED_DATA
