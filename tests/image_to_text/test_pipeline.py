"""The drop-in: call forms, shapes and errors of the pipeline that transformers 5 removed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import UnidentifiedImageError

import diptych
from diptych.errors import BadImage, BadInput
from tiny_models import make_captioner, make_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    make_captioner(path, 6)
    make_photo(1).save(path / "photo.png")
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return diptych.pipeline("image-to-text", model=str(folder), device=-1)


def reference(folder: Path, **options: Any) -> str:
    """Do by hand what the removed pipeline did: processor, generate, decode."""
    from transformers import (
        PreTrainedTokenizerFast,
        VisionEncoderDecoderModel,
        ViTImageProcessorPil,
    )

    model = VisionEncoderDecoderModel.from_pretrained(folder)
    pixels = ViTImageProcessorPil.from_pretrained(folder)(make_photo(1), return_tensors="pt")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = model.generate(pixels.pixel_values, **options)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def test_one_picture_in_every_form(pipe: Any, folder: Path) -> None:
    expected = [{"generated_text": reference(folder, max_length=16)}]
    photo = make_photo(1)
    path = folder / "photo.png"
    text = base64.b64encode(path.read_bytes()).decode()
    for form in (photo, str(path), path, text, f"data:image/png;base64,{text}"):
        assert pipe(form) == expected
    assert pipe(images=photo) == expected
    assert pipe.task == "image-to-text"


def test_lists_and_generators(pipe: Any) -> None:
    photos = [make_photo(seed) for seed in range(3)]
    answers = pipe(photos)
    assert [type(answer) for answer in answers] == [list] * 3
    assert answers == [pipe(photo) for photo in photos] == pipe(photos, batch_size=2)
    lazy = pipe(photo for photo in photos)
    assert isinstance(lazy, Iterator)
    assert list(lazy) == answers
    assert pipe([photos[0]]) == [answers[0]]
    assert pipe([]) == []


def test_a_dataset_is_asked_by_number(pipe: Any) -> None:
    photos = [make_photo(seed) for seed in range(3)]

    class Dataset:
        def __len__(self) -> int:
            return len(photos)

        def __getitem__(self, number: int) -> Any:
            return photos[number]

    assert pipe(Dataset(), batch_size=2) == pipe(photos)


def test_options(pipe: Any, folder: Path) -> None:
    photo = make_photo(1)
    assert pipe(photo, max_new_tokens=5) == pipe(photo, generate_kwargs={"max_new_tokens": 5})
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_length": 12}
    assert len(pipe(photo, generate_kwargs=beams)) == 3
    assert pipe(photo, generate_kwargs={"num_beams": 4, "max_length": 12}) == [
        {"generated_text": reference(folder, num_beams=4, max_length=12)}
    ]
    assert pipe(photo, prompt="a cat")[0]["generated_text"].startswith("a cat")


def test_errors_have_the_old_types(pipe: Any, folder: Path) -> None:
    photo = make_photo(1)
    with pytest.raises(ValueError, match="without an inputs argument"):
        pipe()
    with pytest.raises(ValueError, match="only 1 version"):
        pipe(photo, max_new_tokens=5, generate_kwargs={"max_new_tokens": 6})
    with pytest.raises(ValueError, match="Incorrect image source"):
        pipe("no such file.jpg")
    with pytest.raises(ValueError, match="Incorrect format"):
        pipe(3)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for kind in (UnidentifiedImageError, OSError, ValueError, BadImage):
        with pytest.raises(kind, match=r"broken\.png"):
            pipe(str(folder / "broken.png"))
    with pytest.raises(ValueError, match="num_beems"):
        pipe(photo, generate_kwargs={"num_beems": 2})
    with pytest.raises(KeyError, match="Unknown task"):
        diptych.pipeline("text-to-speech")
    with pytest.raises(RuntimeError):
        diptych.pipeline()
    with pytest.raises(TypeError, match="speed"):
        diptych.pipeline("image-to-text", model=str(folder), speed=3)


def test_addresses_are_off_until_allowed(pipe: Any) -> None:
    with pytest.raises(BadInput, match="allow_urls"):
        pipe("https://example.com/photo.jpg")


def test_transparency_is_dropped_as_transformers_does(pipe: Any) -> None:
    photo = make_photo(4).convert("RGBA")
    photo.putalpha(0)
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    assert pipe(photo) == pipe(photo.convert("RGB"))
