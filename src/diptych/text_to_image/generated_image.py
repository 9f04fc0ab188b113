"""Hold a generated picture and everything that is needed to make it again."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.errors import BadInput, DiptychError
from diptych.text_to_image import infotext
from diptych.text_to_image.options import GenerateOptions

__all__ = ["GeneratedImage", "check_picture_name", "write_whole"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedImage:
    """Hold a picture made from words.

    `options` are decided in full: with `prompt`, the options and the same `model` the same picture
    comes again. `notes` tell what was not done as asked, such as a size that was rounded.
    `error` is set, and `image` None, for a picture of a list that could not be made.
    """

    image: Image.Image
    seed: int
    prompt: str
    options: GenerateOptions
    model: str
    notes: tuple[str, ...] = ()
    error: DiptychError | None = None

    @property
    def parameters(self) -> str:
        """Return the settings as one text, in the layout that most programs read."""
        return infotext.to_text(self.prompt, self.options, self.model)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: prompt, seed, model and options, or the error."""
        record: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "model": self.model}
        if self.error is not None:
            return {**record, "error": str(self.error)}
        return {**record, "options": infotext.as_dict(self.options), "notes": list(self.notes)}

    def save(self, path: str | Path, *, metadata: bool = True, quality: int = 95) -> Path:
        """Write the picture as PNG, JPEG or WebP by the name's end, its settings inside.

        `metadata=False` leaves the settings out; `quality` 1..100 is for JPEG and WebP. The file
        appears whole or not at all. Raises `BadInput` where it cannot be written, and the picture's
        own error where there is none.
        """
        if self.error is not None:
            raise self.error
        path = Path(path)
        check_picture_name(path)
        data = infotext.encode(self, path.suffix, metadata=metadata, quality=quality)
        write_whole(path, data)
        return path


def check_picture_name(path: Path) -> None:
    """Raise `BadInput` for a name that a picture cannot be saved under."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path}: give a name that ends in {', '.join(SUFFIXES[:-1])} or .webp")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: cannot be written; is it in a folder that exists?")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears only once it is complete; BadInput where that cannot be."""
    unfinished = path.with_name(f".diptych-{os.getpid()}-{threading.get_ident()}.part")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{path}: the picture cannot be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
