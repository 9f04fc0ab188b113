"""Find a verb when it is asked for: one does not wait for the others, and help for none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

__all__ = ["VERBS", "Verb", "Verbs", "without_frills"]


class Verb(NamedTuple):
    """Say where a verb, or a group of them, is defined, and what it does: its first line."""

    module: str
    attribute: str
    summary: str

    def find(self) -> Callable[..., Any] | typer.Typer:
        """Import the function, or the group."""
        found: Callable[..., Any] | typer.Typer = getattr(
            import_module(f"diptych.cli.{self.module}"), self.attribute
        )
        return found


VERBS = {
    "caption": Verb("caption", "caption", "Describe pictures in words."),
    "generate": Verb("generate", "generate", "Draw what words say."),
    "img2img": Verb("edit", "img2img", "Make pictures out of others, led by words."),
    "inpaint": Verb(
        "edit",
        "inpaint",
        "Repaint a part of pictures, or extend them; all else comes back bit for bit.",
    ),
    "stylize": Verb("edit", "stylize", "Give pictures the style of another."),
    "settings": Verb(
        "settings",
        "settings",
        "Show the prompt and settings inside pictures, whichever program wrote them.",
    ),
    "export": Verb(
        "models",
        "export",
        "Write a model as ONNX files that run without torch, and compare what both make.",
    ),
    "models": Verb("models", "models", "List the models that are embedded, cached and known."),
    "bench": Verb(
        "bench", "bench", "Time a model in every runtime that is installed, on this machine."
    ),
    "evaluate": Verb("evaluate", "app", "Measure a model on data with answers."),
    "finetune": Verb("finetune", "app", "Teach a model from your own pictures."),
}


def without_frills(**settings: Any) -> typer.Typer:
    """Make an app that starts fast: Rich takes longer to import than the whole of diptych."""
    return typer.Typer(
        rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, **settings
    )


class _Found(Mapping[str, Any]):
    """Hold the verbs by name as Click's commands, each made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _as_command(name, VERBS[name].find())
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in VERBS

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


def _as_command(name: str, verb: Callable[..., Any] | typer.Typer) -> Any:
    if isinstance(verb, typer.Typer):
        return get_command(verb)
    alone = without_frills()
    alone.command(name)(verb)
    return get_command(alone)


class Verbs(TyperGroup):
    """Hold all verbs; their list is shown from their first lines, without importing any."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Found()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        shown = {name: TyperCommand(name, help=verb.summary) for name, verb in VERBS.items()}
        TyperGroup(name=self.name, commands=dict(shown)).format_commands(ctx, formatter)
