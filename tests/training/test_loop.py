"""The loop on a task of a few numbers: to the bit, and when things fail."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.errors import BadImage, BadInput
from diptych.training.checkpoints import Checkpoint, Checkpoints
from diptych.training.guards import Guard
from diptych.training.journal import Journal, read_rows
from diptych.training.loop import fit
from diptych.training.optimizers import Group
from diptych.training.options import GeneratorTrainOptions
from diptych.training.parallel import Workers
from diptych.training.report import write_report
from diptych.training.stopping import Stopped
from diptych.training.task import Validation
from diptych.training.workplace import Workplace
from traced import traced_once

WIDTH = 6


class Toy:
    """Fit a linear map, with dropout, to data that follows from the number of the batch."""

    def __init__(self, folder: Path, break_at: dict[int, Any] | None = None, rows: int = 4) -> None:
        torch.manual_seed(0)
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        named = dict(self.linear.named_parameters())
        self.groups = [Group(named, 0.05)]
        self.place = Workplace(folder, torch.device("cpu"), Workers.alone(), "toy")
        self.batches_per_epoch, self.rows = 5, rows
        self.break_at = break_at or {}
        self.sampled: list[int] = []

    def rate(self, step: int) -> float:
        return 1.0

    def losses(self, number: int, rows: slice) -> Tensor:
        action = self.break_at.get(number)
        if callable(action):
            action()
        data = torch.randn(self.rows, WIDTH, generator=torch.Generator().manual_seed(number))
        losses = (self.drop(self.linear(data)) - data.flip(1)).square().mean(1)[rows]
        return losses * action if isinstance(action, float) else losses

    def validate(self) -> Validation | None:
        data = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(10_000))
        loss = float((self.linear(data) - data.flip(1)).square().mean())
        return Validation(loss, {"half": loss / 2}, merit=-loss)

    def sample(self, step: int) -> None:
        self.sampled.append(step)

    def finish(self) -> list[Path]:
        from safetensors.torch import save_file

        path = self.place.folder / "result.safetensors"
        save_file({name: each.detach() for name, each in self.linear.named_parameters()}, path)
        return [path]


def options(**words: Any) -> GeneratorTrainOptions:
    chosen = {
        "max_train_steps": 20,
        "train_batch_size": 4,
        "validation_steps": 5,
        "checkpointing_steps": 7,
        "logging_steps": 2,
        "learning_rate": 0.05,
        "sample_steps": 10,
        **words,
    }
    return GeneratorTrainOptions(**chosen)


def result(folder: Path) -> bytes:
    return (folder / "result.safetensors").read_bytes()


def timeless(folder: Path) -> list[dict[str, Any]]:
    clocks = ("images_per_s", "memory_mb", "eta_s")
    return [
        {k: v for k, v in row.items() if k not in clocks}
        for row in read_rows(folder / "metrics.jsonl")
    ]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"ema_decay": 0.9, "keep_best": True},
    {"gradient_accumulation_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 4},
    {"optimizer": "muon", "lr_scheduler": "linear"},
]


@pytest.mark.parametrize("words", VARIANTS, ids=["plain", "ema", "cosine", "muon"])
@pytest.mark.parametrize("stop_at", traced_once([1, 7, 13]))
def test_a_resumed_run_is_the_run(tmp_path: Path, words: dict[str, Any], stop_at: int) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir(), parted.mkdir()
    fit(Toy(whole), options(**words))
    parts = words.get("gradient_accumulation_steps", 1)

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped) as stopped:
        fit(Toy(parted, {stop_at * parts - 1: interrupt}), options(**words))
    assert stopped.value.step == stop_at
    finished = fit(Toy(parted), options(**words), resume=True)
    assert result(whole) == result(parted)
    assert timeless(whole) == timeless(parted)
    assert finished.step == 20


def test_steps_are_those_of_plain_torch(tmp_path: Path) -> None:
    toy, twin = Toy(tmp_path), Toy(tmp_path)
    fit(toy, options(max_train_steps=6, gradient_accumulation_steps=2))
    optimizer = torch.optim.AdamW(twin.linear.parameters(), lr=0.05, weight_decay=1e-2)
    from diptych.training.loop import _seed

    for step in range(6):
        optimizer.zero_grad()
        for part in range(2):
            torch.manual_seed(_seed(0, 2 * step + part, 0))
            (twin.losses(2 * step + part, slice(None)).mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(twin.linear.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(toy.linear.weight, twin.linear.weight)


def test_the_callers_random_numbers_stay(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    toy = Toy(tmp_path)
    torch.manual_seed(5)
    fit(toy, options())
    assert torch.equal(torch.rand(3), wanted)


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    fit(toy, options(ema_decay=0.5, max_train_steps=3))
    kept = load_file(tmp_path / "result.safetensors")["weight"]
    assert not torch.equal(kept, toy.linear.weight), "the last weights are other ones"
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "validation" in row]
    with torch.no_grad():
        toy.linear.load_state_dict(load_file(tmp_path / "result.safetensors"))
        found = toy.validate()
    assert found is not None
    assert rows[-1]["validation"]["loss"] == pytest.approx(found.loss, rel=1e-5)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    # A huge rate for the last steps spoils what was learned before.
    class Spoiled(Toy):
        def rate(self, step: int) -> float:
            return 1.0 if step < 10 else 40.0

    finished = fit(Spoiled(tmp_path), options(keep_best=True))
    assert finished.best_step == 10
    assert finished.end is not None
    assert finished.start is not None
    assert finished.end < finished.start
    toy = Toy(tmp_path)
    toy.linear.load_state_dict(load_file(tmp_path / "result.safetensors"))
    with torch.no_grad():
        found = toy.validate()
    assert found is not None
    assert found.loss == pytest.approx(finished.end, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(
    tmp_path: Path, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy(tmp_path, {4: bad})
    fit(toy, options())
    assert "step 5 is left out" in caplog.text
    assert bool(torch.isfinite(toy.linear.weight).all())


def test_too_many_of_them_end_the_run(tmp_path: Path) -> None:
    toy = Toy(tmp_path, dict.fromkeys(range(9, 100), math.nan))
    with pytest.raises(
        # Not 14: while no step gives numbers, none pushes out what was saved before.
        BadInput,
        match=r"learning_rate 0.05 is too high.*give 0.005.*step 7 is whole",
    ):
        fit(toy, options(max_train_steps=50, checkpointing_steps=7))
    assert bool(torch.isfinite(toy.linear.weight).all())


def test_metrics_are_json_for_every_reader(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, tensorboard=False, leads=True)
    journal.write({"step": 1, "loss": math.nan, "validation": {"loss": math.inf, "t": 1.0}})
    journal.close()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert found == {"step": 1, "loss": None, "validation": {"loss": None, "t": 1.0}}
    # A run that goes on draws its report from what it reads back.
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(rows[0]["loss"]) and math.isnan(rows[0]["validation"]["loss"])
    write_report(tmp_path, rows, {})
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_rate_that_ruins_the_first_steps_is_told(tmp_path: Path) -> None:
    class Ruined(Toy):
        def rate(self, step: int) -> float:
            return 4000.0

    with pytest.raises(BadInput, match=r"the loss rose from .* too high"):
        fit(Ruined(tmp_path), options(max_train_steps=15))


def test_losses_below_nothing_end_no_run() -> None:
    guard = Guard()
    for step in range(40):  # as of rewarded captions
        guard.watch(step, -0.2 + 0.3 * (step % 2), str)


def test_nothing_is_learned_by_heart_in_three_steps() -> None:
    guard, falling = Guard(), [Validation(loss, {}, -loss) for loss in (1.13, 1.14, 1.27, 6.48)]
    for step in range(3):
        guard.watch(step, 1.0, str)
        told = guard.sees_overfitting(falling[step], falling[step + 1], falling[0])
        assert not told


def test_a_loss_that_runs_away_ends_the_run(tmp_path: Path) -> None:
    toy = Toy(tmp_path, {number: 1.0 + max(0, number - 30) for number in range(200)})
    with pytest.raises(BadInput, match=r"the loss rose from .* learning_rate"):
        fit(toy, options(max_train_steps=200))


def test_over_fitting_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Worse(Toy):
        times = 0

        def validate(self) -> Validation | None:
            self.times += 1
            loss = 1.0 if self.times < 4 else self.times / 4
            return Validation(loss, {}, merit=-loss)

    fit(Worse(tmp_path), options(max_train_steps=60))
    rows = read_rows(tmp_path / "metrics.jsonl")
    warned = [row["step"] for row in rows if "warning" in row]
    assert warned
    assert "by heart" in caplog.text
    assert "by heart" in (tmp_path / "report.html").read_text()


def test_what_fails_inside_a_step_keeps_the_step_before(tmp_path: Path) -> None:
    def vanish() -> None:
        raise BadImage("cat.png", "cannot be read (No such file or directory)")

    whole = tmp_path / "whole"
    whole.mkdir()
    fit(Toy(whole), options())
    with pytest.raises(BadImage, match=r"cat.png: cannot be read.*step 11 is kept"):
        fit(Toy(tmp_path, {11: vanish}), options())
    fit(Toy(tmp_path), options(), resume=True)
    assert result(tmp_path) == result(whole)


def test_a_full_disk_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diptych.training.checkpoints as checkpoints

    whole = tmp_path / "whole"
    whole.mkdir()
    fit(Toy(whole), options())
    real = checkpoints.save_file

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        if "step-00000014" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, *rest)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(BadInput, match=r"No space left on device.*That of step 7 is whole"):
        fit(Toy(tmp_path), options())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    fit(Toy(tmp_path), options(), resume=True)
    assert result(tmp_path) == result(whole)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    fit(Toy(tmp_path), options())
    wanted = result(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000020" / name
    actions: dict[str, Callable[[], Any]] = {
        "flip": lambda: damage(newest),
        "cut": lambda: newest.write_bytes(newest.read_bytes()[:-3]),
        "remove": newest.unlink,
    }
    actions[how]()
    (tmp_path / "result.safetensors").unlink()
    fit(Toy(tmp_path), options(), resume=True)
    assert "is damaged" in caplog.text
    assert result(tmp_path) == wanted


def test_checkpoints_are_thinned_out(tmp_path: Path) -> None:
    words = {"checkpointing_steps": 3, "checkpoints_total_limit": 3}
    fit(Toy(tmp_path), options(**words))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000015", "step-00000018", "step-00000020"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"learning_rate": 0.1}, "began with learning_rate=0.05, not 0.1"),
        ({"seed": 4}, "began with seed=0, not 4"),
        ({"rank": 2}, "rank=None"),
        ({"max_train_steps": 10}, "at step 20 already"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, words: dict[str, Any], told: str) -> None:
    fit(Toy(tmp_path), options())
    with pytest.raises(BadInput, match=told):
        fit(Toy(tmp_path), options(**words), resume=True)


def test_other_data_is_refused(tmp_path: Path) -> None:
    fit(Toy(tmp_path), options())
    other = Toy(tmp_path)
    other.place = dataclasses.replace(other.place, fingerprint="changed")
    with pytest.raises(BadInput, match="other pictures, captions or weights"):
        fit(other, options(), resume=True)


def test_a_longer_run_goes_on(tmp_path: Path) -> None:
    long, extended = tmp_path / "long", tmp_path / "extended"
    long.mkdir(), extended.mkdir()
    fit(Toy(long), options(max_train_steps=30))
    fit(Toy(extended), options())
    fit(Toy(extended), options(max_train_steps=30), resume=True)
    assert result(long) == result(extended)


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    assert fit(Toy(tmp_path), options(), resume=True).step == 20


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        fit(Toy(tmp_path, {3: twice}), options())
    assert not isinstance(raised.value, Stopped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_in_a_thread(tmp_path: Path) -> None:
    steps = []
    thread = threading.Thread(target=lambda: steps.append(fit(Toy(tmp_path), options()).step))
    thread.start()
    thread.join()
    assert steps == [20]


def test_rows_say_what_was_measured(tmp_path: Path) -> None:
    toy, heard = Toy(tmp_path), []
    fit(toy, options(), tell=heard.append)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert heard == json.loads(json.dumps(rows))
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 21, 2))
    assert [row["step"] for row in rows if "validation" in row] == [0, 5, 10, 15, 20]
    assert toy.sampled == [0, 10, 20]
    first = rows[0]["validation"]
    assert first["change"] == 0
    assert rows[-1]["validation"]["change"] == pytest.approx(
        rows[-1]["validation"]["loss"] / first["loss"] - 1
    )
    trained = next(row for row in rows if "loss" in row)
    assert trained["images_per_s"] > 0
    assert trained["memory_mb"] > 0
    assert trained["eta_s"] >= 0


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(Toy(tmp_path), options(report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_rows(tmp_path / "metrics.jsonl")
    wanted = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    found = [(each.step, each.value) for each in events.Scalars("loss")]
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [v for _, v in found] == pytest.approx([v for _, v in wanted])
    assert len(events.Scalars("validation/half")) == 5


def test_half_precision_on_a_cpu_learns(tmp_path: Path) -> None:
    finished = fit(Toy(tmp_path), options(mixed_precision="bf16", max_train_steps=40))
    assert finished.change is not None
    assert finished.change < -0.1


def test_no_step_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fit(Toy(tmp_path), options())
    assert not caplog.records


def test_damaged_checkpoints_do_not_count(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(Checkpoint(300, {"a": torch.zeros(2)}, {}))
    (tmp_path / "step-00000300" / "state.safetensors").write_bytes(b"x")
    # The run begins anew, and what it saves stays.
    kept.save(Checkpoint(100, {"a": torch.ones(2)}, {}))
    found = kept.last()
    assert found is not None and found.step == 100
    assert kept.newest_step() == 100


def test_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    for keep, left in ((1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])):
        kept = Checkpoints(tmp_path / str(keep), keep=keep)
        for step in range(1, 6):
            kept.save(Checkpoint(step, {"a": torch.ones(2)}, {}))
        there = sorted(int(path.name[-8:]) for path in (tmp_path / str(keep)).iterdir())
        assert there == left


def test_of_equal_merit_the_lower_loss_is_kept(tmp_path: Path) -> None:
    """CIDEr-D of a single picture is always 0."""

    class Even(Toy):
        def validate(self) -> Validation | None:
            found = super().validate()
            return None if found is None else dataclasses.replace(found, merit=0.0)

    toy = Even(tmp_path)
    finished = fit(toy, options(max_train_steps=20, keep_best=True))
    assert finished.best_step


def test_what_has_no_gradient_stays_as_it_is(tmp_path: Path) -> None:
    class Beside(Toy):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.idle = nn.Parameter(torch.ones(3, 3))
            (group,) = self.groups
            self.groups = [Group({**group.parameters, "idle": self.idle}, group.learning_rate)]

    toy = Beside(tmp_path)
    fit(toy, options(max_train_steps=5, weight_decay=0.5))
    assert torch.equal(toy.idle, torch.ones(3, 3))
