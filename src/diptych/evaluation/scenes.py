"""Say what is in a scene of coloured shapes: grammar, sentences and held-out prompts.

A `Scene` holds one or two groups of equal objects ("two red circles") and, where there are two,
how the first lies to the second. Rendered with exact ground truth (`recipes/scenes`), scenes tell
whether a generator draws what the sentence says.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from diptych.errors import BadInput

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TASKS",
    "Group",
    "Scene",
    "ScenePrompt",
    "evaluation_prompts",
    "held_out",
    "paraphrase",
    "parse_sentence",
    "sample_scene",
    "sentence",
]

SHAPES = ("circle", "square", "triangle", "star")
# RGB of the middle of each colour. Hues lie at least 20 degrees apart, saturation is high.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (218, 36, 40),
    "orange": (246, 132, 20),
    "yellow": (250, 216, 32),
    "green": (44, 164, 72),
    "blue": (36, 90, 216),
    "purple": (142, 58, 178),
}
SIZES = ("small", "large")  # no word: medium
COUNTS = ("a", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("black", "grey", "white")
TASKS = ("single object", "two objects", "count", "position", "colour attribution")


@dataclass(frozen=True, slots=True)
class Group:
    """Hold 1 to 3 equal objects; `size` is small, large or None for medium."""

    count: int
    size: str | None
    colour: str
    shape: str

    def __post_init__(self) -> None:
        known = self.colour in COLOURS and self.shape in SHAPES
        if not (known and self.size in (None, *SIZES) and self.count in (1, 2, 3)):
            raise BadInput(f"{self!r} is not a group of 1 to 3 objects of a scene")


@dataclass(frozen=True, slots=True)
class Scene:
    """Hold one or two groups; `relation` None joins two by "and"."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        related = self.relation is None or (len(self.groups) == 2 and self.relation in RELATIONS)
        placed = self.background in (None, *BACKGROUNDS)
        if not (len(self.groups) in (1, 2) and related and placed):
            raise BadInput(f"{self!r} is not a scene of one or two groups")


# --- sentences ------------------------------------------------------------------------------------


def sentence(scene: Scene) -> str:
    """Say a scene in its one canonical sentence."""
    words = f" {scene.relation or 'and'} ".join(_noun_phrase(group) for group in scene.groups)
    return words if scene.background is None else f"{words} on a {scene.background} background"


def _noun_phrase(group: Group, count: str | None = None) -> str:
    rest = f"{group.size + ' ' if group.size else ''}{group.colour} {group.shape}"
    if group.count > 1:
        return f"{count or COUNTS[group.count - 1]} {rest}s"
    return f"{count or ('an' if rest[0] in 'aeiou' else 'a')} {rest}"


_OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ")
_COUNT_WORDS = (("", "", "one"), ("two", "two", "2"), ("three", "three", "3"))
_RELATION_WORDS: Mapping[str | None, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    None: ("and", "and", "with"),
}
_BACKGROUND_WORDS = (
    "on a {} background",
    "on a {} background",
    "on {}",
    "with a {} background",
    "against a {} background",
)


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """Say a scene in one of several ways, for training; `parse_sentence` understands them all."""
    phrases = [
        _noun_phrase(group, _pick(rng, _COUNT_WORDS[group.count - 1]) or None)
        for group in scene.groups
    ]
    words = f" {_pick(rng, _RELATION_WORDS[scene.relation])} ".join(phrases)
    if scene.background is not None:
        words += " " + _pick(rng, _BACKGROUND_WORDS).format(scene.background)
    return _pick(rng, _OPENINGS) + words


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(sorted({re.escape(word) for word in words}, key=len, reverse=True))


_GROUP = (
    rf"(a|an|one|two|three|1|2|3) (?:({_alternatives(SIZES)}) )?"
    rf"({_alternatives(tuple(COLOURS))}) ({_alternatives(SHAPES)})s?"
)
_MEANINGS = {said: relation for relation, ways in _RELATION_WORDS.items() for said in ways}
_SENTENCE = re.compile(
    rf"(?:an? (?:picture|drawing|image) of )?{_GROUP}"
    rf"(?: ({_alternatives(tuple(_MEANINGS))}) {_GROUP})?"
    rf"(?: (?:on|with|against)(?: an?)? ({_alternatives(BACKGROUNDS)})(?: background)?)?"
)
_NUMBERS = {"a": 1, "an": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}


def parse_sentence(text: str) -> Scene | None:
    """Return the scene that a sentence describes, or None where it is not one of this grammar."""
    plain = " ".join(text.lower().replace("gray", "grey").strip(" .").split())
    if not (match := _SENTENCE.fullmatch(plain)):
        return None
    *words, background = match.groups()
    groups = [Group(_NUMBERS[words[0]], words[1], words[2], words[3])]
    if words[4]:
        groups.append(Group(_NUMBERS[words[5]], words[6], words[7], words[8]))
    return Scene(tuple(groups), _MEANINGS.get(words[4]), background)


# --- which scenes ---------------------------------------------------------------------------------

_INVERSE = {"right of": "left of", "below": "above"}
_HELD_OUT_SALT = "scenes-33"  # so chosen that each count holds out every shape and most colours


def held_out(scene: Scene) -> bool:
    """Tell whether no picture of this content may be trained on: a tenth of all, by a stable hash.

    The same content on another background, or said the other way round, is the same content.
    """
    text = f"{_HELD_OUT_SALT}:{sentence(_content(scene))}"
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def _content(scene: Scene) -> Scene:
    """Drop the background and say "b right of a" as "a left of b"."""
    groups = scene.groups
    if scene.relation is None:
        groups = tuple(sorted(groups, key=_noun_phrase))
    elif scene.relation in _INVERSE:
        groups = groups[::-1]
    return Scene(groups, _INVERSE.get(scene.relation or "", scene.relation))


def sample_scene(rng: np.random.Generator, *, held: bool = False) -> Scene:
    """Draw a scene that may be trained on, or with `held` one that is held out.

    35 % one object, 25 % two or three equal ones, 30 % two related groups, 10 % two with "and".
    """
    while True:
        scene = _any_scene(rng)
        if held_out(scene) is held:
            return scene


def _any_scene(rng: np.random.Generator) -> Scene:
    kind = rng.random()
    background = _pick(rng, BACKGROUNDS) if rng.random() < 0.25 else None
    if kind < 0.6:
        count = 1 if kind < 0.35 else 2 + int(rng.integers(2))
        return Scene((_group(rng, count),), None, background)
    relation = _pick(rng, RELATIONS) if kind < 0.9 else None
    return Scene(_two_groups(rng), relation, background)


def _group(rng: np.random.Generator, count: int) -> Group:
    size = _pick(rng, (None, None, *SIZES))
    return Group(count, size, _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES))


def _two_groups(rng: np.random.Generator) -> tuple[Group, Group]:
    """Draw two groups that differ in colour or shape, mostly of one object each."""
    counts = [1 + int(rng.random() < 0.2) for _ in range(2)]
    while True:
        first, second = (_group(rng, count) for count in counts)
        if (first.colour, first.shape) != (second.colour, second.shape):
            return first, second


T = TypeVar("T")


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


@dataclass(frozen=True, slots=True)
class ScenePrompt:
    """Hold one prompt of the evaluation: the task it belongs to, its scene and its sentence."""

    task: str
    scene: Scene

    @property
    def prompt(self) -> str:
        return sentence(self.scene)


def evaluation_prompts(n: int = 300, seed: int = 2024) -> list[ScenePrompt]:
    """Draw n held-out prompts, task by task in turn; equal n and seed give equal prompts.

    A sentence comes twice only where a task has no other: give every picture its own seed.
    """
    if n < 1:
        raise BadInput(f"evaluation prompts: {n} asked for; ask for 1 or more")
    rng = np.random.default_rng(seed)
    seen: set[Scene] = set()
    prompts = []
    for index in range(n):
        task = TASKS[index % len(TASKS)]
        count = 1 + index // len(TASKS) % 3
        scene = _unseen(task, count, rng, seen)
        prompts.append(ScenePrompt(task, scene))
    return prompts


def _unseen(task: str, count: int, rng: np.random.Generator, seen: set[Scene]) -> Scene:
    for attempt in itertools.count():
        scene = _TASK_SCENES[task](rng, count)
        if held_out(scene) and (scene not in seen or attempt > 200):
            break
    seen.add(scene)
    return scene


def _task_single(rng: np.random.Generator, count: int) -> Scene:
    return replace(_any_scene(rng), groups=(_group(rng, 1),), relation=None)


def _task_count(rng: np.random.Generator, count: int) -> Scene:
    return replace(_any_scene(rng), groups=(_group(rng, count),), relation=None)


def _task_position(rng: np.random.Generator, count: int) -> Scene:
    return replace(_any_scene(rng), groups=_two_groups(rng), relation=_pick(rng, RELATIONS))


def _task_pair(rng: np.random.Generator, count: int) -> Scene:
    """Draw two single objects that differ in colour and in shape, so that swapping them shows."""
    while True:
        first, second = (_group(rng, 1) for _ in range(2))
        if first.colour != second.colour and first.shape != second.shape:
            return replace(_any_scene(rng), groups=(first, second), relation=None)


_TASK_SCENES: Mapping[str, Callable[[np.random.Generator, int], Scene]] = {
    "single object": _task_single,
    "two objects": _task_pair,
    "count": _task_count,
    "position": _task_position,
    "colour attribution": _task_pair,
}
