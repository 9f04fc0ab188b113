"""Write docs/reference/ from the code: docstrings, the command line, the options.

python docs/generate_reference.py            write the pages
python docs/generate_reference.py --check    exit with 1 where a page is not what it would write
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/generate_reference.py: change the code, then run it again. -->"

# What the API page shows, in its order: module → names, whose order is the reader's.
API = {
    "diptych": (
        *("Captioner", "Caption", "CaptionOptions", "caption", "pipeline"),
        *("ImageGenerator", "GeneratedImage", "GenerateOptions", "generate"),
        *("ImageToImageOptions", "InpaintOptions", "StyleOptions"),
        *("finetune_generator", "GeneratorTrainOptions"),
        *("finetune_captioner", "CaptionerTrainOptions"),
        *("export", "available_models", "read_settings"),
    ),
    "diptych.training.finetune": ("Reporting", "read_data"),
    "diptych.training.loop": ("Finished",),
    "diptych.training.stopping": ("Stopped",),
    "diptych.training.data": ("Dataset", "DatasetReport"),
    "diptych.text_to_image.previews": ("DenoisingStep",),
    "diptych.text_to_image.infotext": ("from_text", "Settings"),
    "diptych.text_to_image.schedules": ("NoiseSchedule", "ScheduleConfig", "Steps"),
    "diptych.text_to_image.samplers": ("sample", "NoiseSource", "Step"),
    "diptych.text_to_image.denoiser": ("build_denoiser", "EpsDenoiser", "Guided"),
    "diptych.text_to_image.prompts": (
        "encode_prompts",
        "parse_prompt",
        "PromptPair",
        "Conditioning",
    ),
    "diptych.weights.adapters": ("LoraHandle",),
    "diptych.image_to_text.pipeline": ("ImageToTextPipeline",),
    "diptych.weights.catalog": ("ModelInfo",),
    "diptych.images": (
        *("ImageLimits", "Preprocessing", "open_image", "preprocess", "overlay_heatmap"),
        "contact_sheet",
    ),
    "diptych.evaluation.caption_metrics": (
        *("score_captions", "CaptionScores", "bleu", "rouge_l", "cider_d", "CiderD"),
        *("bootstrap_interval", "tokenize", "tokenize_words"),
    ),
    "diptych.evaluation.captions": ("report", "CaptionReport", "read_references", "read_captions"),
    "diptych.evaluation.adherence": ("judge", "Judgement", "report"),
    "diptych.evaluation.image_metrics": ("psnr", "ssim"),
    "diptych.errors": (
        *("DiptychError", "UnknownModel", "UnsupportedModel", "WeightsMismatch", "BadInput"),
        *("BadImage", "MissingExtra"),
    ),
}
# Public for other rooms of the house, of no use to a reader.
HIDDEN = {
    *("Captioner", "Captioner.from_model", "Captioner.look", "CaptionOptions.for_search"),
    *("ImageGenerator", "ImageGenerator.from_model", "GenerateOptions.resolve"),
    "GenerateOptions.of",
    *("InpaintOptions.check", "StyleOptions.shares", "StyleOptions.temperature"),
    *("StyleOptions.is_neutral", "StyleOptions.chosen_layers"),
}
INTRODUCTIONS = {
    "diptych": (
        "Everything here is imported when it is first used, so `import diptych` is cheap. An "
        "`ImageInput` is a path, encoded bytes, a binary file, a `data:` or http(s) URL, a PIL "
        'image or a NumPy array. `Alpha` is `"white"`, `"drop"` or `"keep"`, `OnError` is '
        '`"keep"` or `"raise"`. An `Array` is NumPy or torch.'
    ),
    "diptych.text_to_image.infotext": "Settings that pictures carry inside their files.",
    "diptych.text_to_image.schedules": (
        "The parts of a run, for putting others together: see "
        "[diffusion in ten minutes](../concepts/diffusion.md)."
    ),
    "diptych.images": "Pictures by themselves, without a model.",
    "diptych.errors": "Every error that a user can cause is one of these.",
}


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them; return the exit code."""
    if unknown := set(arguments) - {"--check"}:
        print(f"unknown argument {sorted(unknown)[0]!r}\n\n{__doc__}", file=sys.stderr)  # noqa: T201
        return 2
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        told = "is out of date: run python docs/generate_reference.py" if arguments else "written"
        print("".join(f"docs/reference/{name} {told}\n" for name in stale), end="")  # noqa: T201
    return int(bool(arguments and stale))


def pages() -> dict[str, str]:
    """Return the text of every page, by file name."""
    made = {"api.md": api_page(), "cli.md": cli_page(), "options.md": options_page()}
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


# --- Python ---------------------------------------------------------------------------------------


def api_page() -> Iterator[str]:
    """Yield the lines of the page of public names, with their signatures and docstrings."""
    yield from (NOTE, "", "# Python", "", "The words in square brackets are shapes of arrays.", "")
    for module_name, names in API.items():
        module = importlib.import_module(module_name)
        yield from (f"## `{module_name}`", "")
        if module_name in INTRODUCTIONS:
            yield from (INTRODUCTIONS[module_name], "")
        if module_name == "diptych.errors":
            tree = inspect.getdoc(module) or ""
            yield from (*tree[tree.index("```") : tree.rindex("```") + 3].splitlines(), "")
        for name in names:
            value = getattr(module, name)
            yield from _class(name, value) if inspect.isclass(value) else _function(name, value, 3)


def _class(name: str, value: type) -> Iterator[str]:
    yield from (f"### `{name}`", "")
    if dataclasses.is_dataclass(value) and name not in OPTIONS:
        fields = [f for f in dataclasses.fields(value) if f.repr and not f.name.startswith("_")]
        lines = [f"    {field.name}: {field.type}{_default(field)}" for field in fields]
        yield from ("```text", f"{name}(", *(line + "," for line in lines), ")", "```", "")
    elif "__init__" in vars(value) and name not in HIDDEN and not issubclass(value, Exception):
        yield from ("```text", *_signature(name, value.__init__), "```", "")
    yield from (*_docstring(value), "")
    if name in OPTIONS:
        told, anchor = OPTIONS[name][0].lower(), OPTIONS[name][0].lower().replace(" ", "-")
        yield from (f"The fields are described in [{told}](options.md#{anchor}).", "")
    for member_name, member in vars(value).items():
        inner = getattr(member, "__func__", getattr(member, "fget", member))
        public = not member_name.startswith("_") or member_name == "__call__"
        full = f"{name}.{member_name}"
        if public and full not in HIDDEN and inspect.isfunction(inner) and inner.__doc__:
            kind = "property" if isinstance(member, property) else ""
            yield from _function(full, inner, 4, kind)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_quoted(field.default)}"
    return ""


def _quoted(value: Any) -> str:
    """Write a value with double quotes, as the sources do."""
    text = repr(value)
    return text if '"' in text else text.replace("'", '"')


def _function(name: str, value: Any, level: int, kind: str = "") -> Iterator[str]:
    yield from (f"{'#' * level} `{name}`", "")
    if kind == "property":
        yield from ("```text", f"{name}: {value.__annotations__.get('return', '')}", "```", "")
    else:
        yield from ("```text", *_signature(name, value), "```", "")
    yield from (*_docstring(value), "")


def _signature(name: str, value: Any) -> list[str]:
    """Write a signature as in the source, on one line where it fits."""
    signature = inspect.signature(value)
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(_parameter(parameter))
    returns = signature.return_annotation
    arrow = "" if returns in (signature.empty, None, "None") else f" -> {_type(returns)}"
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) <= 88:
        return [line]
    return [f"{name}(", *(f"    {part}," for part in parts), f"){arrow}"]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        default = parameter.default
        plain = default is None or isinstance(default, bool | int | float | str | tuple)
        shown = (
            repr(default) if plain else getattr(default, "__name__", f"{type(default).__name__}()")
        )
        text += f" = {shown}"
    return text


def _name_of(default: Any) -> str:
    return getattr(default, "__name__", f"{type(default).__name__}()")


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _docstring(value: Any) -> list[str]:
    return (inspect.getdoc(value) or "").splitlines()


# --- the command line -----------------------------------------------------------------------------


def cli_page() -> Iterator[str]:
    """Yield the lines of the page of verbs and flags, read from the Typer app itself."""
    yield from (NOTE, "", "# Command line", "")
    yield from ("`diptych` and `python -m diptych` are the same program.", "")
    yield from ("Results go to standard output, progress and complaints to standard error.", "")
    yield from ("| exit code | meaning |", "|---|---|")
    codes = ("all is well", "it failed", "wrong usage: a flag, an option, a file name")
    yield from (f"| {number} | {text} |" for number, text in enumerate(codes))
    yield from ("| 3 | some inputs failed, the others have their results |",)
    yield from ("| 130 | interrupted |", "")
    yield from ("Every command has `-h`, `--help`; `diptych --version` prints the version.", "")
    for name, verb in _verbs():
        yield from _command(name, verb)


def _verbs() -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name and the function behind it."""
    from diptych.cli.verbs import VERBS

    for name, verb in VERBS.items():
        found: Any = verb.find()
        if inspect.isfunction(found):
            yield f"diptych {name}", found
            continue
        for info in found.registered_commands:
            yield f"diptych {name} {info.name}", info.callback


def _command(name: str, verb: Any) -> Iterator[str]:
    from typer.models import ArgumentInfo

    arguments, flags = [], []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        kind, told = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
        (arguments if isinstance(told, ArgumentInfo) else flags).append((parameter, kind, told))
    kind = _options_of(parameter.name for parameter, _, _ in flags)
    names = _option_names(kind)
    shared = [_flag_names(p, told)[0] for p, _, told in flags if p.name in names]
    own = [flag for flag in flags if flag[0].name not in names]
    usage = [name, "[OPTIONS]", *(_placeholder(p, kind) for p, kind, _ in arguments)]
    yield from (f"## `{name}`", "", inspect.getdoc(verb) or "", "")
    yield from ("```text", " ".join(usage), "```", "")
    yield from _table(
        ("argument", "meaning"),
        [(f"`{_placeholder(p, kind)}`", told.help) for p, kind, told in arguments],
    )
    yield from _table(
        ("flag", "value", "default", "meaning"),
        [
            (
                ", ".join(f"`{n}`" for n in _flag_names(p, told)),
                _value(kind, told),
                _shown(p),
                told.help,
            )
            for p, kind, told in own
        ],
    )
    if shared:
        title = OPTIONS[kind][0].lower()
        every = "all" if len(shared) == len(names) else "these"
        link = f"[{title}](options.md#{title.replace(' ', '-')})"
        yield from (f"And {every} of the {link} as flags:", "")
        yield from (f"{_code(*shared)}.", "")


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _flag_names(parameter: inspect.Parameter, told: Any) -> list[str]:
    """Return the long name first; the one Typer makes up where none is given."""
    # Inside Annotated, Typer keeps the first name where a default would be.
    declared = (told.default, *(told.param_decls or ()))
    names = [name for name in declared if isinstance(name, str) and name.startswith("-")]
    if not names:
        dashed = parameter.name.replace("_", "-")
        is_switch = _core(parameter.annotation.__origin__) is bool
        names = [f"--{dashed}/--no-{dashed}" if is_switch else f"--{dashed}"]
    return [name for both in names for name in both.split("/")]


def _placeholder(parameter: inspect.Parameter, kind: Any) -> str:
    return parameter.name.upper() + ("…" if typing.get_origin(_core(kind)) is list else "")


def _value(kind: Any, told: Any) -> str:
    core = _core(kind)
    if core is bool:
        return ""
    if isinstance(core, type) and issubclass(core, enum.Enum):
        return " ".join(f"`{choice.value}`" for choice in core)
    several = typing.get_origin(core) is list
    core = typing.get_args(core)[0] if several else core
    text = {int: "whole number", float: "number", Path: "path"}.get(core, "text")
    text += f", {told.min} or more" if told.min is not None else ""
    return text + (", may be repeated" if several else "")


def _core(kind: Any) -> Any:
    """Return the type inside Optional."""
    inner = [each for each in typing.get_args(kind) if each is not type(None)]
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return inner[0] if optional else kind


def _shown(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default in (None, "", False) or default is parameter.empty:
        return ""
    return f"`{getattr(default, 'value', default)}`"


def _options_of(names: Iterable[str]) -> str:
    """Return the class of options that most of a verb's flags belong to."""
    flags = set(names)
    return max(OPTIONS, key=lambda kind: len(flags & _option_names(kind)))


def _option_names(kind: str) -> set[str]:
    return {field.name for field in dataclasses.fields(_options_class(kind))}


def _options_class(kind: str) -> Any:
    return getattr(importlib.import_module(OPTIONS[kind][1]), kind)


# --- options --------------------------------------------------------------------------------------

# Class → title of its section, module, what comes before and after the table.
OPTIONS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "CaptionOptions": (
        "Caption options",
        "diptych.image_to_text.options",
        (
            "The same words in Python (`captioner.caption(image, num_beams=4)`), as flags of the",
            "command line (`--num-beams 4`) and in `CaptionOptions(num_beams=4)`.",
            "",
            "What is not set comes from the model's generation config, and from the last column",
            "where that says nothing.",
        ),
        (
            "Naming `temperature`, `top_k`, `top_p` or `seed` turns sampling on. Sampling and",
            "`num_beams` above 1 exclude each other. `max_new_tokens` wins over `max_length`.",
            "How these words act is told in [how captions are decoded](../concepts/decoding.md).",
        ),
    ),
    "GenerateOptions": (
        "Generate options",
        "diptych.text_to_image.options",
        (
            "The same words in Python (`generator.generate(prompt, eta=0.5)`), as flags of the",
            "command line (`--eta 0.5`) and in `GenerateOptions(eta=0.5)`.",
            "",
            "What is not set comes from the model, and from the last column where that says",
            "nothing. `generator.options` tells what holds.",
        ),
        (
            "What the samplers are good for is told in",
            "[generating](../guides/generate.md#steps-samplers-schedules), how they work in",
            "[diffusion in ten minutes](../concepts/diffusion.md).",
        ),
    ),
    "ImageToImageOptions": (
        "Image to image options",
        "diptych.text_to_image.options",
        (
            "Words of `generator.image_to_image`, flags of `diptych img2img`, and fields of",
            "`ImageToImageOptions`: the [generate options](#generate-options), with another",
            "default of `strength`, and these. Width and height follow from the picture.",
        ),
        ("How they act is told in [image to image](../guides/image-to-image.md).",),
    ),
    "InpaintOptions": (
        "Inpaint options",
        "diptych.text_to_image.options",
        (
            "Words of `generator.inpaint`, flags of `diptych inpaint`, and fields of",
            "`InpaintOptions`: those of [image to image](#image-to-image-options), with another",
            "default of `strength`, and these.",
        ),
        ("How they act is told in [inpainting](../guides/inpaint.md).",),
    ),
    "StyleOptions": (
        "Style options",
        "diptych.text_to_image.style_options",
        (
            "Words of `generator.style_transfer`, flags of `diptych stylize`, and fields of",
            "`StyleOptions`. Of the [generate options](#generate-options), `negative_prompt`,",
            "`width`, `height`, `clip_skip` and `parse_weights` count as well.",
        ),
        ("How they act is told in [style transfer](../guides/style-transfer.md).",),
    ),
    "GeneratorTrainOptions": (
        "Generator training options",
        "diptych.training.options",
        (
            "Words of `finetune_generator`, flags of `diptych finetune generator`, and fields of",
            "`GeneratorTrainOptions`. Where the method or the model decides, the default says so.",
        ),
        (
            "How they act is told in [a style or subject](../guides/finetune-generator.md) and",
            "[one subject, one word](../guides/finetune-subject.md).",
        ),
    ),
    "CaptionerTrainOptions": (
        "Captioner training options",
        "diptych.training.options",
        (
            "Words of `finetune_captioner`, flags of `diptych finetune captioner`, and fields of",
            "`CaptionerTrainOptions`.",
        ),
        ("How they act is told in [words of one's own field](../guides/finetune-captioner.md).",),
    ),
}
# Fields that a section does not repeat: those of the class it is derived from, where unchanged.
_TOLD_BEFORE = {
    "ImageToImageOptions": "GenerateOptions",
    "InpaintOptions": "ImageToImageOptions",
    "StyleOptions": "GenerateOptions",
}


def options_page() -> Iterator[str]:
    """Yield the lines of the page of options, from the metadata of their fields."""
    yield from (NOTE, "", "# Options", "")
    for kind, (title, _, before, after) in OPTIONS.items():
        yield from (f"## {title}", "", *before, "")
        fields = _own_fields(kind)
        yield from _table(("option", "value", "meaning", "default"), [_option(f) for f in fields])
        yield from (*after, "")


def _own_fields(kind: str) -> list[dataclasses.Field[Any]]:
    from diptych.cli.edit import NOT_OF_STYLE

    fields = list(dataclasses.fields(_options_class(kind)))
    if kind not in _TOLD_BEFORE:
        return fields
    before = {f.name: f.metadata for f in dataclasses.fields(_options_class(_TOLD_BEFORE[kind]))}
    unused = NOT_OF_STYLE if kind == "StyleOptions" else ()
    return [f for f in fields if f.name not in unused and before.get(f.name) != f.metadata]


def _option(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    meta = field.metadata
    default = repr(meta["default"]).replace("''", "none")
    if meta["default"] is None:
        default = "drawn" if field.name == "seed" else "none"
    shown = default if default in ("none", "drawn") else f"`{default}`"
    return f"`{field.name}`", _wanted(meta), meta["help"], shown


def _wanted(meta: Any) -> str:
    if meta["choices"]:
        return " ".join(f"`{choice}`" for choice in meta["choices"])
    names = {
        int: "whole number",
        float: "number",
        bool: "`True` `False`",
        str: "text",
        tuple: "texts",
    }
    text, low, high = names[meta["kind"]], meta["low"], meta["high"]
    if high is not None and high < 2**32:
        return f"{text}, {low:g} to {high:g}"
    return text if low is None else f"{text}, {low:g} or more"


def _table(titles: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    if not rows:
        return
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        cells = [" ".join(str(cell or "").split()).replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"
    yield ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
