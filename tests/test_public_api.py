"""The public surface is frozen: a change here is a change for users."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import diptych

NAMES = {
    "Caption",
    "CaptionOptions",
    "Captioner",
    "CaptionerTrainOptions",
    "DiptychError",
    "GenerateOptions",
    "GeneratedImage",
    "GeneratorTrainOptions",
    "ImageGenerator",
    "ImageToImageOptions",
    "InpaintOptions",
    "StyleOptions",
    "__version__",
    "available_models",
    "caption",
    "export",
    "finetune_captioner",
    "finetune_generator",
    "generate",
    "pipeline",
    "read_settings",
}


def test_names() -> None:
    assert set(diptych.__all__) == NAMES
    assert all(hasattr(diptych, name) for name in NAMES)


def test_importing_costs_next_to_nothing() -> None:
    script = (
        "import sys, diptych\n"
        "heavy = {'numpy', 'torch', 'onnxruntime', 'PIL', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_generator_imports_fast_and_without_torch() -> None:
    """A second is promised: measured as processor time, for the machine may be busy."""
    script = (
        "import sys, time\n"
        "from diptych import ImageGenerator\n"
        "assert 'torch' not in sys.modules\n"
        "print(time.process_time())\n"
    )
    times = [
        float(
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout
        )
        for _ in range(3)
    ]
    assert min(times) <= 1.0, times


def test_generating_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # importing it raises
        "from fake_generator import make_generator\n"
        "picture = make_generator().generate('red', sampler='euler_a', seed=1)\n"
        "assert picture.image.getpixel((0, 0))[0] > 200\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
