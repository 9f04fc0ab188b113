"""The published size, 239 million random weights: what tiny models cannot show."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.runtimes.agreement import greedy_tokens, pictures_for
from diptych.runtimes.network import open_networks
from diptych.runtimes.smaller_captioner import quantize_captioner
from diptych.weights.files import describe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, export: Callable[..., Any]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    captioner = VisionEncoderDecoder(VisionEncoderDecoderConfig()).eval()
    for parameter in captioner.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.04)
    config = {"encoder": {"num_channels": 3, "image_size": 224}}
    images = pictures_for(config, {}, None, 4)
    report = export(captioner, folder / "fp32", images=images)
    return folder, report, quantize_captioner(folder / "fp32", folder / "int8")


def test_words_are_those_of_torch(exported: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    tokens = exported[1]["fp32"]["tokens"]
    assert (tokens["identical"], tokens["first_difference"]) == (4, None)
    networks = exported[1]["fp32"]["networks"]
    for network in networks.values():
        assert max(network["max_abs_difference"].values()) < 2e-3
    # 239 million numbers, the words' embeddings among them once.
    assert sum(network["bytes"] for network in networks.values()) < 239.3e6 * 4


def test_int8_is_small_and_close(exported: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, _, report = exported
    networks = report["int8"]["networks"]
    assert sum(network["bytes"] for network in networks.values()) < 248.5e6  # and a tokenizer
    model = describe(folder / "int8")
    opened = open_networks(model)
    images = pictures_for(model.config, model.preprocessing, None, 3)
    together = greedy_tokens(opened, images, model.config, model.generation)
    alone = [greedy_tokens(opened, [i], model.config, model.generation)[0] for i in images]
    assert together == alone
    (all_bridged,) = opened["encoder"](pixel_values=np.stack(images))
    (bridged,) = opened["encoder"](pixel_values=images[1][None])
    assert np.array_equal(bridged[:, :, 0], all_bridged[:, :, 1])


def test_int4_is_smaller(
    exported: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    report = quantize_captioner(exported[0] / "fp32", tmp_path / "int4", "int4", force=True)
    networks = report["int4"]["networks"]
    assert sum(network["bytes"] for network in networks.values()) < 153e6
    assert report["int4"]["sweep"] and report["int4"]["bits"]["exceptions"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_int8_captions_within_a_gigabyte(
    exported: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """A limit on addresses, which counts more than memory: mapped files and libraries too."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (300, 200), "navy").save(picture)
    command = f"ulimit -v 1000000; {sys.executable} -m diptych caption {picture} --num-beams 4"
    command += f" --model {exported[0] / 'int8'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
def test_int8_fits_in_450_mb(exported: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    """The networks and their runtime; tokenizer and pictures take about 30 MB more."""
    code = f"""
        from pathlib import Path

        from diptych.runtimes.agreement import greedy_tokens, pictures_for
        from diptych.runtimes.network import open_networks
        from diptych.weights.files import describe

        model = describe({str(exported[0] / "int8")!r})
        networks = open_networks(model)
        images = pictures_for(model.config, model.preprocessing, None, 1)
        greedy_tokens(networks, images, model.config, model.generation)
        # Not ru_maxrss, which counts the process that this one was forked from.
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 410 * 1024
