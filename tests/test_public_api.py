"""The public surface is frozen: a change here is a change for users."""

from __future__ import annotations

import subprocess
import sys

import diptych

NAMES = {
    "Caption",
    "CaptionOptions",
    "Captioner",
    "DiptychError",
    "GenerateOptions",
    "GeneratedImage",
    "ImageGenerator",
    "__version__",
    "available_models",
    "caption",
    "export",
    "generate",
    "pipeline",
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
