"""Small captioned pictures, and small generators and captioners of the references."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import make_captioner
from tiny_pipelines import make_pipeline
from training_pictures import draw_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures", 12, seed=1)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd1"
    make_pipeline(folder, "sd1", seed=3)
    return folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    make_pipeline(folder, "sdxl", seed=4)
    return folder


@pytest.fixture(scope="session")
def vit_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "captioner"
    make_captioner(folder, 5)
    return folder
