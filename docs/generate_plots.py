"""Plot the training logs of the default models, as their cards show them.

    python docs/generate_plots.py

Reads `recipes/*/log/*/*.jsonl`, writes `docs/models/*-training.png`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, Any]]


def main() -> None:
    """Write both plots."""
    for name, panels in (
        ("default-captioner", captioner(logs("default_captioner"))),
        (
            "default-generator",
            generator(logs("default_generator"), logs("default_generator", "cpu")),
        ),
    ):
        figure = Figure(figsize=(3.2 * len(panels), 2.6), layout="constrained")
        for axes, (title, unit, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for label, xs, ys in lines:
                axes.plot(xs, ys, label=label, linewidth=1.4)
            axes.set(title=title, xlabel=unit)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        path = ROOT / "docs" / "models" / f"{name}-training.png"
        figure.savefig(path, dpi=110)
        print(f"{path.relative_to(ROOT)} written")  # noqa: T201


def logs(recipe: str, device: str = "gpu") -> dict[str, Rows]:
    """Return the rows of each stage's log."""
    folder = ROOT / "recipes" / recipe / "log" / device
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }


def line(rows: Rows, unit: str, name: str, label: str) -> tuple[str, list[Any], list[Any]]:
    """Return what is drawn of one figure of the rows that have it."""
    found = [row for row in rows if name in row and unit in row]
    return label, [row[unit] for row in found], [row[name] for row in found]


def captioner(stages: dict[str, Rows]) -> list[Any]:
    """Return a panel a stage."""
    pretrain, train, refine = (stages[name] for name in ("pretrain", "train", "refine"))
    cider = "CIDEr-D, val, greedy"
    return [
        ("Tiny-ImageNet", "epoch", [line(pretrain, "epoch", "val_accuracy_average", "right, val")]),
        (
            "captions: loss",
            "epoch",
            [line(train, "epoch", "loss", "training"), line(train, "epoch", "val_loss", "val")],
        ),
        ("captions: score", "epoch", [line(train, "epoch", "val_cider", cider)]),
        (
            "self-critical",
            "epoch",
            [line(refine, "epoch", "reward", "reward"), line(refine, "epoch", "val_cider", cider)],
        ),
    ]


def generator(stages: dict[str, Rows], later: dict[str, Rows]) -> list[Any]:
    """Return the errors of autoencoder, decoder, painters (in four bands of noise), four steps.

    The painter of half the size learnt on a GPU; what ships went on from it.
    """
    vae, train, deeper = stages["vae"], stages["train"], later["deeper"]
    decoders = {"with a last look": "finish_vae", "from painted latents": "decoder"}
    return [
        ("autoencoder", "step", [line(vae, "step", "squared", "squared error")]),
        (
            "decoder",
            "step",
            [line(later[name], "step", "squared", label) for label, name in decoders.items()],
        ),
        ("painter before: 9.6 M", "step", bands(train)),
        ("painter that ships: 18.6 M", "step", bands(deeper)),
        (
            "painters, all noise",
            "step",
            [
                line(train, "step", "loss", "9.6 M"),
                line(deeper, "step", "loss", "18.6 M"),
            ],
        ),
        ("four steps", "step", [line(later["deeper_few"], "step", "loss", "error of v")]),
    ]


def bands(rows: Rows) -> list[tuple[str, list[Any], list[Any]]]:
    """Return a line for each band of noise."""
    steps = [row["step"] for row in rows]
    return [
        (f"t {250 * i} to {250 * (i + 1)}", steps, [row["bands"][i] for row in rows])
        for i in range(4)
    ]


if __name__ == "__main__":
    main()
