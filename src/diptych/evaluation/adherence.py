"""Measure whether pictures of scenes show what their prompts say, in the style of GenEval.

Each picture is looked at by `scene_vision`, and judged by its prompt's task (Ghosh et al. 2023,
"GenEval"). A score alone says little: beside it stand what pictures of other prompts would score,
and what is scored by guessing only the thing that is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.errors import BadInput
from diptych.evaluation.captions import read_json_lines
from diptych.evaluation.scene_vision import FoundObject, find_objects
from diptych.evaluation.scenes import TASKS, Group, Scene, ScenePrompt, parse_sentence

__all__ = [
    "AdherenceReport",
    "Judgement",
    "Score",
    "judge",
    "read_scene_prompts",
    "report",
    "wilson_interval",
]

# What is scored by someone who draws the right objects and guesses what the task asks; for the
# first two tasks the objects themselves are what is asked.
_GUESS: Mapping[str, float] = {
    "single object": 1 / 24,  # 6 colours × 4 shapes
    "two objects": 2 / 16,  # two shapes of 4 each
    "count": 1 / 3,
    "position": 1 / 4,
    "colour attribution": 1 / 2,
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """Hold which demands of its prompt a picture meets.

    `shapes`: every shape is there in some colour. `objects`: every shape is there in its colour.
    `count`: exactly the objects named, nothing else. `position`: the objects are there, in the
    relation named (True where none is). `passed`: what the task asks.
    """

    task: str
    shapes: bool
    objects: bool
    count: bool
    position: bool
    passed: bool

    @property
    def everything(self) -> bool:
        return self.count and self.position


@dataclass(frozen=True, slots=True)
class Score:
    """Hold the share of `num` pictures that pass, its 95 % interval, and chance beside it.

    `dealt`: the same pictures dealt to the wrong prompts; None without another prompt. `guess`: the
    right objects, the rest guessed; None where that says nothing.
    """

    share: float
    interval: tuple[float, float]
    dealt: float | None
    guess: float | None
    num: int


@dataclass(frozen=True, slots=True)
class AdherenceReport:
    """Hold one score a task, and over all prompts those of object + colour, count, everything."""

    tasks: Mapping[str, Score]
    overall: Mapping[str, Score]
    judgements: tuple[Judgement, ...]
    found: tuple[tuple[FoundObject, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            part: {name: _score_dict(score) for name, score in scores.items()}
            for part, scores in (("tasks", self.tasks), ("overall", self.overall))
        }


def _score_dict(score: Score) -> dict[str, Any]:
    return {
        "share": score.share,
        "interval": list(score.interval),
        "chance_dealt": score.dealt,
        "chance_guess": score.guess,
        "pictures": score.num,
    }


# --- one picture ----------------------------------------------------------------------------------


def judge(prompt: ScenePrompt, found: Sequence[FoundObject]) -> Judgement:
    """Judge what was found in a picture by its prompt."""
    groups = prompt.scene.groups
    members = [_members(group, found) for group in groups]
    objects = all(members)
    wanted, seen = [group.shape for group in groups], [each.shape for each in found]
    shapes = all(seen.count(shape) >= wanted.count(shape) for shape in wanted)
    exact = all(len(those) == group.count for those, group in zip(members, groups, strict=True))
    count = exact and len(found) == sum(group.count for group in groups)
    position = objects and _related(prompt.scene, members)
    passed = {
        "single object": objects,
        "two objects": shapes,
        "count": count,
        "position": position,
        "colour attribution": objects,
    }[prompt.task]
    return Judgement(prompt.task, shapes, objects, count, position, passed)


def _members(group: Group, found: Sequence[FoundObject]) -> list[FoundObject]:
    return [each for each in found if (each.colour, each.shape) == (group.colour, group.shape)]


def _related(scene: Scene, members: Sequence[Sequence[FoundObject]]) -> bool:
    """Tell whether the first group's middle lies to the second's as the relation says.

    Of four equal sectors one is right: beside means more beside than above.
    """
    if scene.relation is None:
        return True
    first, second = (np.mean([each.centre for each in those], axis=0) for those in members)
    x, y = map(float, second - first)
    return {
        "left of": x > abs(y),
        "right of": -x > abs(y),
        "above": y > abs(x),
        "below": -y > abs(x),
    }[scene.relation]


# --- all pictures ---------------------------------------------------------------------------------


def report(prompts: Sequence[ScenePrompt], pictures: Iterable[Image.Image]) -> AdherenceReport:
    """Judge B pictures by their B prompts, and by each other's for chance.

    Of several pictures only one is held at a time. Raises `BadInput` for other numbers.
    """
    found = tuple(tuple(find_objects(picture)) for picture in pictures)
    if len(prompts) != len(found) or not prompts:
        raise BadInput(f"{len(found)} pictures for {len(prompts)} prompts: give one for each")
    judged = tuple(judge(prompt, each) for prompt, each in zip(prompts, found, strict=True))
    dealt = {task: list(_dealt(task, prompts, found)) for task in TASKS}
    tasks = {}
    for task in TASKS:
        passed = [each.passed for each in judged if each.task == task]
        if passed:
            tasks[task] = _score(passed, [each.passed for each in dealt[task]], _GUESS[task])
    wrong = [each for task in TASKS for each in dealt[task]]
    overall = {
        title: _score([getattr(each, key) for each in judged], [getattr(w, key) for w in wrong])
        for title, key in (
            ("object + colour", "objects"),
            ("exact count", "count"),
            ("everything", "everything"),
        )
    }
    return AdherenceReport(tasks, overall, judged, found)


def _dealt(
    task: str, prompts: Sequence[ScenePrompt], found: Sequence[Sequence[FoundObject]]
) -> Iterator[Judgement]:
    """Judge every picture of a task by every other prompt of that task."""
    rows = [index for index, prompt in enumerate(prompts) if prompt.task == task]
    for here in rows:
        for there in rows:
            scene, other = prompts[here].scene, prompts[there].scene
            if (scene.groups, scene.relation) != (other.groups, other.relation):
                yield judge(prompts[there], found[here])


def _score(passed: Sequence[bool], dealt: Sequence[bool], guess: float | None = None) -> Score:
    chance = sum(dealt) / len(dealt) if dealt else None
    interval = wilson_interval(sum(passed), len(passed))
    return Score(sum(passed) / len(passed), interval, chance, guess, len(passed))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share (Wilson 1927): sound also near 0 and 1."""
    z = 1.959964
    share = successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


# --- files ----------------------------------------------------------------------------------------


def read_scene_prompts(path: Path) -> tuple[list[ScenePrompt], list[Path]]:
    """Read JSON lines with `file` and `prompt`, and maybe `task`; paths are relative to the file.

    Raises `BadInput` naming the line whose prompt is no sentence of the scene grammar.
    """
    prompts, files = [], []
    for number, row in read_json_lines(path):
        file, prompt = row.get("file"), row.get("prompt")
        if not isinstance(file, str) or not isinstance(prompt, str):
            raise BadInput(f"{path}, line {number}: needs a picture's 'file' and its 'prompt'")
        scene = parse_sentence(prompt)
        if scene is None:
            raise BadInput(
                f"{path}, line {number}: {prompt!r} is no sentence about coloured shapes, such as "
                "'two red circles left of a blue square'"
            )
        task = row.get("task", _task_of(scene))
        if task not in TASKS:
            raise BadInput(f"{path}, line {number}: task {task!r} is none of {', '.join(TASKS)}")
        prompts.append(ScenePrompt(task, scene))
        files.append(path.parent / file)
    if not prompts:
        raise BadInput(f"{path}: has no prompts")
    return prompts, files


def _task_of(scene: Scene) -> str:
    if len(scene.groups) == 1:
        return "single object" if scene.groups[0].count == 1 else "count"
    return "colour attribution" if scene.relation is None else "position"
