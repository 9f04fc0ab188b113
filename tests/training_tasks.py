"""Make what a training loop works on, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diptych.training.data import prepare
from diptych.training.generator import GeneratorTask
from diptych.training.methods import generator_defaults
from diptych.training.options import GeneratorTrainOptions
from diptych.training.parallel import Workers
from diptych.training.workplace import Workplace
from diptych.weights.generator_files import describe_generator
from diptych.weights.load_generator import load_generator

SMALL = {"resolution": 64, "max_train_steps": 3, "num_sample_images": 0, "train_batch_size": 2}


def make_task(
    model: Path, data: Path, folder: Path, prediction_type: str | None = None, **words: Any
) -> GeneratorTask:
    described = describe_generator(model, prediction_type=prediction_type)
    options = GeneratorTrainOptions(**{**SMALL, **words})
    options = options.resolve(generator_defaults(options, described))
    dataset = prepare(data, validation_fraction=0.25)
    return GeneratorTask(
        described,
        load_generator(described, dtype="float32"),
        dataset,
        options,
        Workplace(folder, torch.device("cpu"), Workers.alone()),
    )
