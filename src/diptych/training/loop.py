"""The one training loop: a task says what is learned, the loop how.

All chance follows from the seed and the number of the batch, so a run that goes on from a
checkpoint does what it would have done: on a CPU, to the bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.errors import BadInput, DiptychError
from diptych.training.checkpoints import Checkpoint, Checkpoints
from diptych.training.guards import Guard
from diptych.training.journal import Journal
from diptych.training.memory import HALVES
from diptych.training.optimizers import (
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
)
from diptych.training.options import TrainOptions
from diptych.training.report import write_report
from diptych.training.state import Average, pack_optimizer, unpack_optimizer
from diptych.training.stopping import Asked, Stopped, heeding_signals
from diptych.training.task import Task, Validation

__all__ = ["Finished", "fit"]

logger = logging.getLogger("diptych")

# What may differ when a run goes on: it changes what is shown or kept, not what is learned.
_FREE = frozenset(
    {
        "checkpointing_steps",
        "checkpoints_total_limit",
        "gradient_checkpointing",
        "keep_best",
        "logging_steps",
        "max_train_steps",
        "num_sample_captions",
        "num_sample_images",
        "report_to",
        "sample_prompts",
        "sample_steps",
        "save_kohya",
        "save_single_file",
        "validation_steps",
    }
)


@dataclass(frozen=True, slots=True)
class Finished:
    """Hold how a run ended: the files, and the validation losses of its start and its end."""

    folder: Path
    files: tuple[Path, ...]
    step: int
    start: float | None
    end: float | None
    best_step: int | None = None

    @property
    def change(self) -> float | None:
        """Return the change of the validation loss as a share of that at the start."""
        if not self.start or self.end is None:
            return None
        return self.end / self.start - 1


def fit(
    task: Task,
    options: TrainOptions,
    *,
    resume: bool = False,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> Finished:
    """Train `task` in its folder, from the last checkpoint there with `resume`.

    Ctrl-C and SIGTERM end it after the step at hand, with a checkpoint; raises `Stopped` then.
    Raises `BadInput` where the run cannot go on: other settings, a full disk, a loss that is not
    finite. The caller keeps other runs out of the folder.
    """
    with torch.random.fork_rng(devices=[]):
        run = _Run(task, options, resume, tell)
        try:
            with heeding_signals() as asked:
                return run.go(asked)
        finally:
            run.close()


class _Run:
    """Hold one run: what learns, the optimizer, and what is remembered between steps."""

    def __init__(
        self,
        task: Task,
        options: TrainOptions,
        resume: bool,
        tell: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        folder, workers = task.place.folder, task.place.workers
        self.task, self.options, self.folder, self.workers = task, options, folder, workers
        self.total = options.max_train_steps
        self.parameters: dict[str, nn.Parameter] = {
            name: each for group in task.groups for name, each in group.parameters.items()
        }
        self.optimizer = make_optimizer(task.groups, options, workers)
        self.average = Average(self, options.ema_decay) if options.ema_decay else None
        dtype = HALVES.get(options.mixed_precision)
        self._autocast: Any = (
            (lambda: torch.autocast(task.place.device.type, dtype)) if dtype else nullcontext
        )
        is_scaled = options.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(task.place.device.type, enabled=is_scaled)
        self.checkpoints = Checkpoints(folder / "checkpoints", options.checkpoints_total_limit)
        self.step, self.guard = 0, Guard()
        self.start: Validation | None = None
        self.last: Validation | None = None
        self.best: tuple[int, Validation] | None = None
        self.best_tensors: dict[str, Tensor] = {}
        self.losses: list[float] = []  # since the last line of metrics
        self.seen = 0  # pictures, since this process began
        if resume:
            self._resume()
        self.journal = Journal(
            folder,
            self.step,
            tensorboard=options.report_to == "tensorboard" and workers.leads,
            tell=tell if workers.leads else None,
            leads=workers.leads,
        )
        self.began = time.monotonic()

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return what learns, by name."""
        return self.parameters

    # --- the loop -----------------------------------------------------------------------------

    def go(self, asked: Asked) -> Finished:
        options = self.options
        if self.step == 0:
            self.start = self._validate()
            if options.keep_best and self.start is None:
                logger.warning(
                    "keep_best: no picture is held out, so the last weights will be kept: give "
                    "validation_fraction, or more pictures"
                )
            self._sample()
        while self.step < self.total:
            self._update()
            if self._is_due(options.logging_steps):
                self._log()
            if self._is_due(self._validation_steps()):
                self._validate()
            if self._is_due(self._sample_steps()):
                self._sample()
            stops = self._anyone(asked.to_stop) and self.step < self.total
            # Weights that give no numbers must not push out those of before.
            is_due = self._is_due(options.checkpointing_steps) and not self.guard.not_finite
            if stops or is_due or self.step == self.total:
                self._save()
            if stops:
                raise Stopped(self.step, self.folder)
        return self._finish()

    def _update(self) -> None:
        """Take one step of the optimizer."""
        options, number = self.options, self.step * self.options.gradient_accumulation_steps
        group = self.optimizer.param_groups[0]
        factor = learning_rate_factor(
            options.lr_scheduler,
            self.step,
            self.total,
            options.lr_warmup_steps,
            group["peak"],
        )
        set_learning_rate(self.optimizer, factor * self.task.rate(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        try:
            for part in range(options.gradient_accumulation_steps):
                loss += self._backward(number + part)
        except DiptychError as error:
            # A picture that vanished, say: the weights are still those of the step before.
            if self.workers.count > 1:
                raise  # the others do not know of it: the last checkpoint has to do
            self._save()
            raise type(error)(*_with_hint(error, self.step)) from error
        self._step_optimizer(loss)
        self.step += 1
        self.seen += options.train_batch_size * options.gradient_accumulation_steps

    def _backward(self, number: int) -> float:
        options, workers = self.options, self.workers
        torch.manual_seed(_seed(options.seed, number, workers.rank))
        rows = slice(workers.rank, None, workers.count)
        with self._autocast():
            losses = self.task.losses(number, rows)
            loss = losses.sum() / options.train_batch_size
        if losses.numel():
            self.scaler.scale(loss / options.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
        value = loss.detach().float().reshape(1).cpu()
        workers.add_up([value])
        return float(value) / options.gradient_accumulation_steps

    def _step_optimizer(self, loss: float) -> None:
        parameters = [*self.parameters.values()]
        if self.workers.count > 1:  # all add up the same
            for each in parameters:
                each.grad = torch.zeros_like(each) if each.grad is None else each.grad
            self.workers.add_up([each.grad for each in parameters if each.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm)
        self.norm = float(norm)
        is_finite = math.isfinite(loss) and math.isfinite(self.norm)
        if is_finite:
            self.scaler.step(self.optimizer)
            self.losses.append(loss)
            if self.average is not None:
                self.average.update(self)
            self.guard.watch(self.step + 1, loss, self._advice)
        else:
            scales = self.scaler.is_enabled() and math.isfinite(loss)
            self.guard.leave_out(self.step + 1, loss, self.norm, self._advice, scales=scales)
        if self.scaler.is_enabled():
            self.scaler.update()

    def _advice(self) -> str:
        rate = max(group["peak"] for group in self.optimizer.param_groups)
        kept = self.checkpoints.newest_step()
        whole = "" if kept is None else f"; the checkpoint of step {kept} is whole"
        return (
            f"learning_rate {rate:g} is too high for this data: give {rate / 10:g}, in another "
            f"folder{whole}"
        )

    # --- what is due now and then -------------------------------------------------------------

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _validation_steps(self) -> int:
        return self.options.validation_steps or max(1, self.total // 10)

    def _sample_steps(self) -> int:
        return getattr(self.options, "sample_steps", None) or max(1, self.total // 4)

    def _log(self) -> None:
        if not self.losses:
            return
        elapsed = max(time.monotonic() - self.began, 1e-9)
        speed = self.seen / elapsed
        each = self.options.train_batch_size * self.options.gradient_accumulation_steps
        batches = self.step * self.options.gradient_accumulation_steps
        row = {
            "step": self.step,
            "epoch": round(batches / self.task.batches_per_epoch, 3),
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": self.norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_s": round(speed, 3),
            "memory_mb": _memory_mb(self.task.place.device),
            "eta_s": round((self.total - self.step) * each / speed) if speed else None,
        }
        if self.workers.leads:
            self.journal.write(row)
        self.losses = []

    def _validate(self) -> Validation | None:
        """Measure the weights that would be kept now, and remember the best."""
        with self._kept(), torch.no_grad(), self._autocast():
            found = self.task.validate()
        if found is None:
            return None
        start = self.start or found
        before, self.last = self.last, found
        if self.best is None or _rank(found) > _rank(self.best[1]):
            self.best = self.step, found
            if self.options.keep_best:
                with self._kept():
                    self.best_tensors = {
                        name: each.detach().clone() for name, each in self.parameters.items()
                    }
        row: dict[str, Any] = {
            "step": self.step,
            "validation": {
                "loss": found.loss,
                "change": found.loss / start.loss - 1 if start.loss else 0.0,
                **found.parts,
            },
            **found.shown,
        }
        if before is not None and self.guard.sees_overfitting(before, found, self.best[1]):
            row["warning"] = (
                f"validation has risen since step {self.best[0]} while training falls: it learns "
                "the pictures by heart; stop here, or give keep_best"
            )
            logger.warning("step %d: %s", self.step, row["warning"])
        if self.workers.leads:
            self.journal.write(row)
            write_report(self.folder, self.journal.rows, self.options.as_dict())
        return found

    def _sample(self) -> None:
        if self.workers.leads:
            with self._kept(), torch.no_grad(), self._autocast():
                self.task.sample(self.step)
            write_report(self.folder, self.journal.rows, self.options.as_dict())
        self.workers.wait()

    def _finish(self) -> Finished:
        best_step = None
        if self.options.keep_best and self.best is not None and self.best_tensors:
            best_step = self.best[0]
            with torch.no_grad():
                for name, each in self.parameters.items():
                    each.copy_(self.best_tensors[name])
            files = self.task.finish() if self.workers.leads else []
        else:
            with self._kept():
                files = self.task.finish() if self.workers.leads else []
        self.workers.wait()
        end = self.best[1] if best_step is not None and self.best else self.last
        if self.workers.leads:
            write_report(self.folder, self.journal.rows, self.options.as_dict())
        return Finished(
            folder=self.folder,
            files=tuple(files),
            step=self.step,
            start=self.start.loss if self.start else None,
            end=end.loss if end else None,
            best_step=best_step,
        )

    def _kept(self) -> Any:
        """Put the weights that would be kept in place: the averaged ones, where there are."""
        return nullcontext() if self.average is None else self.average.swapped(self)

    # --- checkpoints --------------------------------------------------------------------------

    def _save(self) -> None:
        if self.workers.leads:
            tensors: dict[str, Tensor] = {
                f"weights.{name}": each for name, each in self.parameters.items()
            }
            if self.average is not None:
                tensors |= {f"average.{n}": each for n, each in self.average.tensors.items()}
            tensors |= {f"best.{name}": each for name, each in self.best_tensors.items()}
            tensors |= {f"optimizer.{n}": e for n, e in pack_optimizer(self.optimizer).items()}
            self.checkpoints.save(Checkpoint(self.step, tensors, self._progress()))
        self.workers.wait()

    def _progress(self) -> dict[str, Any]:
        return {
            "options": self.options.as_dict(),
            "data": self.task.place.fingerprint,
            "start": _as_dict(self.start),
            "last": _as_dict(self.last),
            "best": None if self.best is None else [self.best[0], _as_dict(self.best[1])],
            "losses": self.losses,
            "guard": self.guard.as_dict(),
            "scaler": self.scaler.state_dict(),
            "average_steps": self.average.steps if self.average is not None else 0,
        }

    def _resume(self) -> None:
        found = self.checkpoints.last()
        if found is None:
            return
        said = found.progress
        _check_same(said["options"], self.options.as_dict())
        if said["data"] != self.task.place.fingerprint:
            raise BadInput(
                f"{self.folder}: the run began with other pictures, captions or weights than are "
                "there now: put them back, or begin anew in another folder"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in found.tensors.items():
            prefix, name = key.split(".", 1)
            groups.setdefault(prefix, {})[name] = tensor
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(groups["weights"][name])
        unpack_optimizer(self.optimizer, groups.get("optimizer", {}))
        if self.average is not None:
            kept = groups.get("average", groups["weights"])
            self.average.tensors = {
                name: kept[name].to(each.device, copy=True)
                for name, each in self.parameters.items()
            }
            self.average.steps = said["average_steps"]
        self.best_tensors = groups.get("best", {})
        self.start, self.last = _validation(said["start"]), _validation(said["last"])
        if said["best"] and (self.best_tensors or not self.options.keep_best):
            best = _validation(said["best"][1])
            assert best is not None
            self.best = said["best"][0], best
        self.losses, self.guard = said["losses"], Guard.from_dict(said["guard"])
        self.scaler.load_state_dict(said["scaler"])
        self.step = found.step
        if self.step > self.total:
            raise BadInput(
                f"{self.folder}: the run is at step {self.step} already, and max_train_steps is "
                f"{self.total}: give more"
            )

    def _anyone(self, to_stop: bool) -> bool:
        """Tell whether any process was told to stop: all have to agree."""
        if self.workers.count == 1:
            return to_stop
        votes = torch.tensor([float(to_stop)], device=self.task.place.device)
        self.workers.add_up([votes])
        return float(votes) > 0

    def close(self) -> None:
        self.journal.close()


def _rank(found: Validation) -> tuple[float, float]:
    """Return what makes one state better than another: of equal merit, the lower loss."""
    return found.merit, -found.loss


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `BadInput` for settings that would have made another run."""
    for name, value in new.items():
        if name in old and old[name] != value and name not in _FREE:
            raise BadInput(
                f"the run began with {name}={old[name]!r}, not {value!r}: give the same to resume "
                "it, or another folder to begin anew"
            )
    ends = old.get("max_train_steps"), new.get("max_train_steps")
    if ends[0] != ends[1] and new.get("self_critical_steps"):
        raise BadInput(
            f"the run began with max_train_steps={ends[0]}, and its last "
            f"{new['self_critical_steps']} steps are rewarded: give the same to resume it, or "
            "train what it wrote in another folder"
        )
    if ends[0] != ends[1] and not str(new.get("lr_scheduler")).startswith("constant"):
        logger.warning(
            "max_train_steps was %s and is %s: the %s learning rate follows the new one from here",
            *ends,
            new.get("lr_scheduler"),
        )


def _with_hint(error: DiptychError, step: int) -> tuple[Any, ...]:
    from diptych.errors import BadImage

    hint = f"the state of step {step} is kept: resume when that is mended"
    if isinstance(error, BadImage):
        return error.name, f"{error.reason}; {hint}"
    return (f"{error}; {hint}",)


def _as_dict(found: Validation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"loss": found.loss, "parts": dict(found.parts), "merit": found.merit}


def _validation(said: Mapping[str, Any] | None) -> Validation | None:
    return None if said is None else Validation(said["loss"], said["parts"], said["merit"])


def _seed(seed: int, number: int, rank: int) -> int:
    """Return a seed for what torch draws by itself in one batch: dropout."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + rank) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def _memory_mb(device: torch.device) -> int | None:
    """Return the most memory that was taken so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) >> 20)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak >> 20 if sys.platform == "darwin" else peak >> 10)
