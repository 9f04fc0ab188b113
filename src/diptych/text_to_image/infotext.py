"""Keep the settings of a picture inside its file: written, and read back from any program's.

Two notations. The text that AUTOMATIC1111's web UI made common is a PNG text chunk `parameters`, or
the EXIF UserComment of a JPEG, WebP or AVIF file: the prompt, a line `Negative prompt: …`, and a
last line of `key: value` pairs with commas between. Beside it, PNG files hold the same as JSON in a
chunk `diptych`. Words of other programs become ours here, and nowhere else.
"""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image, PngImagePlugin

from diptych.errors import BadImage, BadInput
from diptych.images import open_image
from diptych.option_fields import plain, values
from diptych.text_to_image.options import GenerateOptions

__all__ = ["Settings", "as_dict", "encode", "from_text", "read_settings", "to_text"]

logger = logging.getLogger("diptych")

_FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF",
}  # fmt: skip
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_MOST_EXIF = 65_000  # bytes: what fits one segment of a JPEG file
_MOST_TEXT = 2**20

_NEGATIVE = "Negative prompt:"
_LEAST_PAIRS = 3  # a last line with fewer is part of the prompt
_PAIR = re.compile(r'\s*(\w[\w \-/]*+):\s*+("(?:\\.|[^\\"])*+"|[^,]*+)\s*+(?:,|$)')
# Written only where the layout itself would lose something, as a prompt that looks like settings.
_EXACT, _EXACT_NEGATIVE = "Exact prompt", "Exact negative prompt"

_SAMPLERS = {
    "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC", "lcm": "LCM", "pndm": "PLMS", "turbo": "Turbo",
}  # fmt: skip
_SCHEDULES = {
    "normal": "Normal", "karras": "Karras", "exponential": "Exponential", "beta": "Beta",
    "sgm_uniform": "SGM Uniform", "simple": "Simple", "kl_optimal": "KL Optimal",
}  # fmt: skip
# What "Automatic" stands for, where it is not the normal one.
_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2m_sde": "exponential"}
_NOISE_SOURCES = {"philox": "NV", "torch": "CPU"}
_NEUTRAL = {"reuse_interval": 1, "token_merging_ratio": 0}  # said only where they do something
_EMPHASIS = {True: "Original", False: "None"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what a file says about how its picture was made.

    `options` are None where nothing is said; `other` holds, in their own words, the settings that
    have no counterpart here or whose values cannot be used.
    """

    prompt: str
    options: GenerateOptions = field(default_factory=GenerateOptions)
    model: str | None = None
    other: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Picture(Protocol):
    """Say what is needed of a picture to save it, as a `GeneratedImage` has it."""

    @property
    def image(self) -> Image.Image: ...
    @property
    def prompt(self) -> str: ...
    @property
    def options(self) -> GenerateOptions: ...
    @property
    def model(self) -> str: ...


def to_text(prompt: str, options: GenerateOptions, model: str | None = None) -> str:
    """Return the settings as text; `from_text` gives them back exactly.

    Only `num_images_per_prompt` is left out: the text is about one picture.
    """
    pairs = dict(_pairs(options, model))
    text = _laid_out(prompt, options.negative_prompt, pairs)
    read = from_text(text)
    if (read.prompt, read.options.negative_prompt) == (prompt, options.negative_prompt):
        return text
    exact = {_EXACT: prompt}
    if options.negative_prompt is not None:
        exact[_EXACT_NEGATIVE] = options.negative_prompt
    return _laid_out(prompt, options.negative_prompt, {**exact, **pairs})


def from_text(text: str) -> Settings:
    """Return the settings that a text tells, whichever program wrote it. Nothing is an error."""
    *lines, last = text[:_MOST_TEXT].strip().split("\n")
    pairs = dict(_read_pairs(last))
    if len(pairs) < _LEAST_PAIRS:
        lines, pairs = [*lines, last], {}
    negative: list[str] | None = None
    words: list[str] = []
    for line in (line.strip() for line in lines):
        if negative is None and line.startswith(_NEGATIVE):
            negative = [line.removeprefix(_NEGATIVE).strip()]
        else:
            (words if negative is None else negative).append(line)
    prompt, against = "\n".join(words), None if negative is None else "\n".join(negative)
    if _EXACT in pairs:
        prompt, against = pairs.pop(_EXACT), pairs.pop(_EXACT_NEGATIVE, None)
    return _settings(prompt, against, pairs)


def as_dict(options: GenerateOptions) -> dict[str, Any]:
    """Return the options as JSON can hold them."""
    return {name: plain(value) for name, value in values(options).items()}


def encode(picture: Picture, suffix: str, *, metadata: bool = True, quality: int = 95) -> bytes:
    """Return the file of a picture, in the format that `suffix` names, its settings inside.

    `quality` 1..100 is for JPEG, WebP (100: lossless) and AVIF. Raises `BadInput` for a suffix that
    cannot be written.
    """
    kind = _FORMATS.get(suffix.lower())
    if kind is None or not _has(kind):
        raise BadInput(f"{suffix} is no kind of picture to write: give .png, .jpg or .webp")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise BadInput(f"quality is {quality!r}: give a whole number from 1 to 100")
    words: dict[str, Any] = {} if kind == "PNG" else {"quality": quality}
    if kind == "WEBP" and quality == 100:
        words["lossless"] = True
    if metadata:
        words |= _png_words(picture) if kind == "PNG" else _exif_words(picture, kind)
    image = picture.image
    if kind != "PNG" and image.mode == "I;16":
        image = open_image(image)
    image = image if kind != "JPEG" else image.convert("RGB")
    file = io.BytesIO()
    image.save(file, kind, **words)
    return file.getvalue()


def read_settings(path: str | Path) -> Settings:
    """Return the settings inside a PNG, JPEG, WebP or AVIF file, whichever program wrote them.

    Raises `BadImage` for a file that is no such picture, `BadInput` for one that tells nothing.
    """
    try:
        with warnings.catch_warnings():
            # Of size, mostly: no pixel is decoded here.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=sorted(set(_FORMATS.values()))) as image:
                told, text = image.info.get("diptych"), image.info.get("parameters")
                if text is None:
                    text = _user_comment(image)
    except OSError as error:
        reason = error.strerror or "it is no PNG, JPEG, WebP or AVIF picture"
        raise BadImage(str(path), reason) from error
    except (ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise BadImage(str(path), f"it cannot be read: {error}") from error
    if isinstance(told, str) and (settings := _from_json(told)):
        return settings
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{path}: this picture holds no settings")
    return from_text(text)


# Text -----------------------------------------------------------------------------------------


def _pairs(options: GenerateOptions, model: str | None) -> Iterator[tuple[str, str]]:
    from diptych import __version__

    def number(value: float) -> str:
        return repr(plain(value)).removesuffix(".0")

    spellings: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("num_inference_steps", "Steps", number),
        ("sampler", "Sampler", _SAMPLERS.__getitem__),
        ("schedule", "Schedule type", _SCHEDULES.__getitem__),
        ("guidance_scale", "CFG scale", number),
        ("seed", "Seed", number),
        ("width", "Size", lambda width: f"{width}x{options.height}"),
        ("strength", "Denoising strength", number),
        ("clip_skip", "Clip skip", lambda layers: number(layers + 1)),
        ("eta", "Eta", number),
        ("guidance_rescale", "Guidance rescale", number),
        ("guidance_interval", "Guidance interval", str),
        ("reuse_interval", "Reuse interval", number),
        ("token_merging_ratio", "Token merging ratio", number),
        ("timestep_spacing", "Timestep spacing", str),
        ("parse_weights", "Emphasis", _EMPHASIS.__getitem__),
        ("noise_source", "RNG", _NOISE_SOURCES.__getitem__),
    )
    for name, key, spell in spellings:
        value = getattr(options, name)
        if name in _NEUTRAL and value == _NEUTRAL[name]:
            continue
        if value is not None and not (name == "width" and options.height is None):
            yield key, spell(value)
    if (options.width is None) != (options.height is None):
        side = "Width" if options.height is None else "Height"
        yield side, number(options.width or options.height or 0)
    if model is not None:
        yield "Model", model
    yield "Version", f"diptych {__version__}"


def _laid_out(prompt: str, negative: str | None, pairs: Mapping[str, str]) -> str:
    lines = [prompt, *([] if negative is None else [f"{_NEGATIVE} {negative}"])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(each)}" for key, each in pairs.items())])


def _quoted(value: str) -> str:
    plain_enough = value and value.isprintable() and not set(value) & set(',:"')
    if plain_enough and value == value.strip():
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def _read_pairs(line: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(line):
        if found := _PAIR.match(line, place):
            yield found[1].strip(), _unquoted(found[2].strip())
            place = found.end()
        else:
            comma = line.find(",", place)
            place = len(line) if comma < 0 else comma + 1


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def _settings(prompt: str, negative: str | None, pairs: dict[str, str]) -> Settings:
    """Turn the pairs of a text into our words, as far as they have any."""
    asked: dict[str, Any] = {} if negative is None else {"negative_prompt": negative}
    used = {"Model"}
    for keys, read in _READ:
        if keys[0] not in pairs:
            continue
        try:
            made = read(*(pairs.get(key, "") for key in keys))
            GenerateOptions(**made)
        except (ValueError, KeyError):  # BadInput is a ValueError
            continue
        asked |= made
        used.update(keys)
    other = {key: value for key, value in pairs.items() if key not in used}
    return Settings(prompt, GenerateOptions(**asked), pairs.get("Model"), MappingProxyType(other))


def _read_sampler(sampler: str, schedule: str) -> dict[str, Any]:
    """Read a sampler and its schedule, which older versions wrote as one name."""
    name, kind = sampler.lower(), schedule.lower()
    for suffix in ("karras", "exponential"):
        if not kind and name.endswith(f" {suffix}"):
            name, kind = name.removesuffix(f" {suffix}"), suffix
    ours = _SAMPLER_OF[name]
    if kind in ("", "uniform"):
        return {"sampler": ours, "schedule": "normal"}
    if kind == "automatic":
        return {"sampler": ours, "schedule": _AUTOMATIC.get(ours, "normal")}
    return {"sampler": ours, "schedule": _SCHEDULE_OF[kind]}


def _read_size(text: str) -> dict[str, Any]:
    width, height = text.lower().split("x")
    return {"width": int(width), "height": int(height)}


def _reads(name: str, kind: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    return lambda text: {name: kind(text)}


_SAMPLER_OF = {label.lower(): name for name, label in _SAMPLERS.items()}
_SCHEDULE_OF = {label.lower(): name for name, label in _SCHEDULES.items()}
_NOISE_OF = {"nv": "philox", "gpu": "philox", "cpu": "torch"}
_IS_READ = {"none": False, "original": True, "no norm": True}
# Keys of the text, and what to make of their values; the first key decides, the others may miss.
_READ: tuple[tuple[tuple[str, ...], Callable[..., dict[str, Any]]], ...] = (
    (("Steps",), _reads("num_inference_steps", int)),
    (("Sampler", "Schedule type"), _read_sampler),
    (("Schedule type",), _reads("schedule", lambda text: _SCHEDULE_OF[text.lower()])),
    (("CFG scale",), _reads("guidance_scale", float)),
    (("Seed",), _reads("seed", int)),
    (("Size",), _read_size),
    (("Width",), _reads("width", int)),
    (("Height",), _reads("height", int)),
    (("Denoising strength",), _reads("strength", float)),
    (("Clip skip",), _reads("clip_skip", lambda text: int(text) - 1)),
    (("Eta",), _reads("eta", float)),
    (("Guidance rescale",), _reads("guidance_rescale", float)),
    (("Guidance interval",), _reads("guidance_interval", str)),
    (("Reuse interval",), _reads("reuse_interval", int)),
    (("Token merging ratio",), _reads("token_merging_ratio", float)),
    (("Timestep spacing",), _reads("timestep_spacing", str)),
    (("Emphasis",), _reads("parse_weights", lambda text: _IS_READ[text.lower()])),
    (("RNG",), _reads("noise_source", lambda text: _NOISE_OF[text.lower()])),
)


# Files ----------------------------------------------------------------------------------------


def _png_words(picture: Picture) -> dict[str, Any]:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", to_text(picture.prompt, picture.options, picture.model))
    told = {"prompt": picture.prompt, "model": picture.model, "options": as_dict(picture.options)}
    chunks.add_text("diptych", json.dumps(told))
    return {"pnginfo": chunks}


def _exif_words(picture: Picture, kind: str) -> dict[str, Any]:
    text = to_text(picture.prompt, picture.options, picture.model)
    # A byte order mark of the prompt's own would be taken for the comment's.
    text = "\ufeff" + text if text.startswith("\ufeff") else text
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    if kind == "JPEG" and len(comment) > _MOST_EXIF:
        logger.warning("the settings are too long for a JPEG file: they are left out")
        return {}
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = comment
    return {"exif": exif.tobytes()}


def _user_comment(image: Image.Image) -> str | None:
    comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes):
        return None
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # Nothing says which byte comes first; in most scripts the high one is the same throughout.
        is_little = text[1::2].count(0) > text[0::2].count(0)
        return text.decode("utf-16-le" if is_little else "utf-16-be", "replace").removeprefix(
            "\ufeff"
        )
    return (text if code in (b"ASCII\0\0\0", b"\0" * 8) else comment).decode("utf-8", "replace")


def _from_json(told: str) -> Settings | None:
    """Return what the chunk `diptych` says; None where it makes no sense."""
    try:
        read = json.loads(told[:_MOST_TEXT])
        known = {each.name for each in fields(GenerateOptions)}
        options = {name: each for name, each in read["options"].items() if name in known}
        prompt, model = read["prompt"], read.get("model")
        if not isinstance(prompt, str) or not isinstance(model, str | None):
            return None
        return Settings(prompt, GenerateOptions(**options), model)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _has(kind: str) -> bool:
    Image.init()
    return kind in Image.SAVE
