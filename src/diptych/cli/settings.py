"""The verb `settings`: how a picture was made, as its file tells."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from diptych.cli.flags import Output
from diptych.cli.terminal import FAILED, SOME_FAILED, Format, complain
from diptych.errors import DiptychError

__all__ = ["settings"]


def settings(
    pictures: Annotated[list[str], typer.Argument(help="Files, folders or globs of pictures.")],
    format: Output = Format.text,
) -> None:
    """Show the prompt and settings inside pictures, whichever program wrote them."""
    from diptych.inputs import find_pictures
    from diptych.text_to_image.infotext import as_dict, read_settings, to_text

    found, failed = find_pictures(pictures), 0
    records: list[dict[str, Any]] = []
    for each in found:
        try:
            told = read_settings(str(each.source))
        except DiptychError as error:
            complain(str(error))
            failed += 1
            continue
        if format is Format.text:
            title = f"{each.name}\n" if len(found) > 1 else ""
            print(title + to_text(told.prompt, told.options, told.model), flush=True)
            continue
        record: dict[str, Any] = {"file": each.name, "prompt": told.prompt, "model": told.model}
        options = as_dict(told.options)
        record["options"] = {name: value for name, value in options.items() if value is not None}
        records.append({**record, "other": dict(told.other)})
    if format is Format.json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
    elif format is Format.jsonl:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    if failed:
        raise typer.Exit(FAILED if failed == len(found) else SOME_FAILED)
