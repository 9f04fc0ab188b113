"""Describe flags to Typer: those that verbs share, and one for each field of an options class."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, Optional, TypeVar, cast, get_type_hints

import typer

from diptych.cli.terminal import Format

__all__ = [
    "BatchSize",
    "Compile",
    "Device",
    "Dtype",
    "Loading",
    "Model",
    "Output",
    "Revision",
    "Runtime",
    "Task",
    "meant",
    "with_options",
]

Model = Annotated[str, typer.Option("--model", "-m", help="Name, folder or hub id of a model.")]
Revision = Annotated[Optional[str], typer.Option(help="Commit or branch of a hub model.")]  # noqa: UP045
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime, openvino or torch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Compile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Compile the torch modules first: default, reduce-overhead, max-autotune."),
]
Task = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--task",
        "--panel",
        help="image-to-text or text-to-image, where the name alone does not say it.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures captioned together.")]
Output = Annotated[Format, typer.Option("--format", "-f", help="How to print the results.")]


Loaded = TypeVar("Loaded")


@dataclasses.dataclass
class Loading:
    """Hold the flags of every verb that loads a model."""

    model: Model = "default"
    runtime: Runtime = "auto"
    device: Device = "auto"
    dtype: Dtype = "auto"
    revision: Revision = None
    compile: Compile = None

    def load(self, load: Callable[..., Loaded]) -> Loaded:
        """Load what these flags name, by `Captioner.load` or `ImageGenerator.load`."""
        loaded: Any = load(
            self.model,
            runtime=self.runtime,
            device=self.device,
            dtype=self.dtype,
            revision=self.revision,
        )
        if self.compile is not None:
            loaded.compile(self.compile)
        return cast(Loaded, loaded)


# The classes of options, and where they are.
_PANELS = {
    "CaptionerTrainOptions": "diptych.training.options",
    "GeneratorTrainOptions": "diptych.training.options",
    "CaptionOptions": "diptych.image_to_text.options",
    "GenerateOptions": "diptych.text_to_image.options",
    "ImageToImageOptions": "diptych.text_to_image.options",
    "InpaintOptions": "diptych.text_to_image.options",
    "StyleOptions": "diptych.text_to_image.style_options",
}


_SHORTER = {"num_inference_steps": "--steps"}


def with_options(
    kind: str, without: tuple[str, ...] = (), shared: tuple[str, type] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb one flag for each field of the options dataclass named `kind`.

    The verb receives the filled dataclass as its argument `options`. The fields `without` mean
    nothing to the verb and get no flag. `shared` names another argument and its dataclass, whose
    fields are flags that several verbs have.
    """

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            asked = {
                field.name: _as_field(field, value)
                for field in fields()
                if (value := values.pop(field.name)) is not None and value != []
            }
            if shared is not None:
                name, group = shared
                own = {field.name for field in dataclasses.fields(group)}
                values[name] = group(**{each: values.pop(each) for each in own})
            return verb(options=options_class()().replace(**asked), **values)

        def fields() -> list[Any]:
            return [f for f in dataclasses.fields(options_class()) if f.name not in without]

        def options_class() -> Any:
            return getattr(import_module(_PANELS[kind]), kind)

        signature = inspect.signature(verb, eval_str=True)
        given = ("options", shared[0]) if shared is not None else ("options",)
        own = [p for p in signature.parameters.values() if p.name not in given]
        # A model has habits of its own; how to train follows from method and data.
        whose = "as method and data want it" if "Train" in kind else "the model's"
        flags = [_flag(field, whose) for field in fields()]
        parameters = [*own, *([] if shared is None else _fields_as_flags(shared[1])), *flags]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = verb.__name__, verb.__doc__
        return run

    return decorate


def _fields_as_flags(group: type) -> list[inspect.Parameter]:
    """Describe the fields of a dataclass, annotated as arguments of a verb would be."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _flag(field: Any, whose: str) -> inspect.Parameter:
    """Describe one field of an options dataclass to Typer; `whose` is a default that varies."""
    meta = field.metadata
    kind: Any = str if "never" in meta["choices"] else meta["kind"]
    kind = list[str] if kind is tuple else kind
    dashed = f"--{field.name.replace('_', '-')}"
    names = [f"{dashed}/--no-{dashed[2:]}"] if kind is bool else [dashed]
    names += [_SHORTER[field.name]] if field.name in _SHORTER else []
    default = "none" if meta["default"] in (None, "", ()) else str(meta["default"])
    default = whose if meta["from_model"] else default
    text = meta["help"]
    if meta["choices"] and all(isinstance(choice, str) for choice in meta["choices"]):
        text = f"{text} One of {', '.join(meta['choices'])}."
    option = typer.Option(*names, help=text, show_default=default)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], option],  # noqa: UP045
    )


def _as_field(field: Any, value: Any) -> Any:
    """Turn what a flag gives into what the field holds."""
    if field.metadata["kind"] is tuple:
        return tuple(value)
    return meant(value) if True in field.metadata["choices"] else value


def meant(value: Any) -> Any:
    """Turn the words true and false of a flag with several choices into what they mean."""
    if not isinstance(value, str):
        return value
    return {"true": True, "false": False}.get(value.lower(), value)
