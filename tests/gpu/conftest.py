"""A GPU beside the CPU: small models, and one line of figures for each thing compared.

All is skipped without a CUDA device. DIPTYCH_GPU_DEVICE=cpu rehearses on a machine without one;
DIPTYCH_GPU_MODELS names a folder with the small models, made beforehand where diffusers is
missing; DIPTYCH_GPU_RESULTS a file that the figures are appended to, as JSON lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

DEVICE = os.environ.get("DIPTYCH_GPU_DEVICE", "cuda")
MODELS = os.environ.get("DIPTYCH_GPU_MODELS")
RESULTS = os.environ.get("DIPTYCH_GPU_RESULTS")
PHOTOS = sorted((Path(__file__).resolve().parents[2] / "examples" / "photos").glob("*.jpg"))
Note = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    missing = DEVICE.startswith("cuda") and not torch.cuda.is_available()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        # Such machines have other versions, which warn of other things.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        if missing:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def photos() -> list[Path]:
    return PHOTOS


@pytest.fixture
def note(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Note:
    """Return a function that tells figures, before anything is asserted of them."""

    def tell(**figures: Any) -> None:
        plain = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
        row = {"part": "tests", "test": request.node.name, **plain}
        with capsys.disabled():
            print("  ".join(f"{k}={v}" for k, v in row.items() if k != "part"), flush=True)  # noqa: T201
        if RESULTS:
            with Path(RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return tell


@pytest.fixture(scope="session")
def small_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import make_captioner

    return _made("captioner", tmp_path_factory, lambda folder: make_captioner(folder, 5))


@pytest.fixture(scope="session")
def small_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> Any:
        pytest.importorskip("diffusers")
        from tiny_pipelines import make_pipeline

        # Few widths, so that little is compiled.
        return make_pipeline(
            folder,
            "sd1",
            3,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    return _made("sd1", tmp_path_factory, make)


def _made(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], Any]) -> Path:
    """Return a model that was made beforehand, else make it."""
    if MODELS:
        folder = Path(MODELS) / name
        if not folder.is_dir():
            make(folder)
        return folder
    folder = factory.mktemp("models") / name
    make(folder)
    return folder
