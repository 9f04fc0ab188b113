"""Settings inside pictures: exact round trips, and the texts of other programs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych import __version__
from diptych.errors import BadImage, BadInput
from diptych.text_to_image.generated_image import GeneratedImage
from diptych.text_to_image.infotext import as_dict, encode, from_text, read_settings, to_text
from diptych.text_to_image.options import (
    NOISE_SOURCES,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    GenerateOptions,
)


class Made:
    """What `encode` wants of a picture."""

    def __init__(
        self,
        prompt: str = "a cat",
        options: GenerateOptions | None = None,
        model: str = "default",
        image: Image.Image | None = None,
    ) -> None:
        self.prompt, self.model = prompt, model
        self.options = options or GenerateOptions(seed=7)
        self.image = image or Image.new("RGB", (16, 24), "teal")


# What is written ------------------------------------------------------------------------------


def test_the_layout_is_the_common_one() -> None:
    options = GenerateOptions(
        negative_prompt="blurry, ugly", num_inference_steps=20, sampler="dpmpp_2m",
        schedule="karras", guidance_scale=7, seed=5, width=512, height=768, clip_skip=1,
        strength=0.75,
    )  # fmt: skip
    assert to_text("a cat,\nsitting", options, "sd-1.5") == (
        "a cat,\nsitting\n"
        "Negative prompt: blurry, ugly\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, "
        "Size: 512x768, Denoising strength: 0.75, Clip skip: 2, Emphasis: Original, RNG: NV, "
        f"Model: sd-1.5, Version: diptych {__version__}"
    )


def test_odd_values_are_quoted() -> None:
    text = to_text("a", GenerateOptions(), 'a, "b": c\n')
    assert r'Model: "a, \"b\": c\n"' in text
    assert from_text(text).model == 'a, "b": c\n'


# Texts of other programs ----------------------------------------------------------------------

A1111 = """masterpiece, (a cat:1.2) on a sofa,
looking: left <lora:x:0.8>
Negative prompt: lowres, bad
hands
Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 3212345678, \
Size: 832x1216, Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Denoising strength: 0.4, \
Clip skip: 2, ENSD: 31337, RNG: CPU, Lora hashes: "x: 1234, y: 56", Version: v1.10.1"""


def test_a_text_of_the_web_ui() -> None:
    read = from_text(A1111)
    assert read.prompt == "masterpiece, (a cat:1.2) on a sofa,\nlooking: left <lora:x:0.8>"
    assert read.options == GenerateOptions(
        negative_prompt="lowres, bad\nhands", num_inference_steps=28, sampler="dpmpp_2m_sde",
        schedule="karras", guidance_scale=6.5, seed=3212345678, width=832, height=1216,
        strength=0.4, clip_skip=1, noise_source="torch",
    )  # fmt: skip
    assert read.model == "sd_xl_base_1.0"
    assert read.other == {
        "Model hash": "31e35c80fc", "ENSD": "31337", "Lora hashes": "x: 1234, y: 56",
        "Version": "v1.10.1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "sampler", "schedule"),
    [
        ("Sampler: Euler a", "euler_a", "normal"),
        ("Sampler: Euler, Schedule type: Uniform", "euler", "normal"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ SDE, Schedule type: Automatic", "dpmpp_sde", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpmpp_2m_sde", "exponential"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", "normal"),
        ("Sampler: PLMS", "pndm", "normal"),
        ("Sampler: UniPC, Schedule type: SGM Uniform", "unipc", "sgm_uniform"),
        ("Sampler: Restart, Schedule type: Karras", None, "karras"),
        ("Sampler: Euler, Schedule type: Align Your Steps", None, None),
    ],
)
def test_samplers_and_schedules(pairs: str, sampler: str | None, schedule: str | None) -> None:
    read = from_text(f"a\nSteps: 20, {pairs}, CFG scale: 7, Seed: 1")
    assert (read.options.sampler, read.options.schedule) == (sampler, schedule)
    if sampler is None:
        assert "Sampler" in read.other, "what cannot be used is not lost"


def test_a_last_line_counts_with_three_pairs() -> None:
    assert from_text("a\nSteps: 20, Seed: 1").prompt == "a\nSteps: 20, Seed: 1"
    assert from_text("a\nSteps: 20, Seed: 1, Size: 64x64").options.width == 64
    assert from_text("a cat: big, dog: small").prompt == "a cat: big, dog: small"
    only = from_text("Steps: 20, Seed: 1, Size: 64x64")
    assert (only.prompt, only.options.seed) == ("", 1)
    assert from_text("") == from_text(" \n ")


def test_values_that_cannot_be_used_stay_as_they_are() -> None:
    read = from_text("a\nSteps: 5000, Seed: -1, CFG scale: x, Size: 3x3, Clip skip: 0, Eta: 0.5")
    assert read.options == GenerateOptions(eta=0.5)
    assert read.other == {
        "Steps": "5000", "Seed": "-1", "CFG scale": "x", "Size": "3x3", "Clip skip": "0",
    }  # fmt: skip


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    ["x" * 10**6, "x y" * 300_000, 'a: "' * 250_000, "a:" + " " * 10**6, ",:" * 500_000,
     'a: "' + "\\" * 10**6, "a: b," * 200_000, "\n" * 10**6,
     "Seed: " + "9" * 10**6 + ", a: b, c: d"],
)  # fmt: skip
def test_hostile_texts_take_no_time(text: str) -> None:
    from_text(text)


# Round trips ----------------------------------------------------------------------------------


def maybe(strategy: Any) -> Any:
    return st.none() | strategy


TRAPS = st.lists(
    st.sampled_from(
        ["Negative prompt:", "Negative prompt: x", "\n", "Steps: 20, Sampler: Euler, Seed: 1",
         *(" ", "\r", '"', "\\", ",", ":", "a", "Exact prompt: x", "\u2028", "\ufeff", "漢", "🐶"),
         "\x00", "null"]
    ),
    max_size=8,
).map("".join)  # fmt: skip
WORDS = st.text(max_size=40) | TRAPS
OPTIONS = st.builds(
    GenerateOptions,
    negative_prompt=maybe(WORDS),
    num_inference_steps=maybe(st.integers(1, 1000)),
    guidance_scale=maybe(st.floats(0, 100)),
    width=maybe(st.integers(16, 4096)),
    height=maybe(st.integers(16, 4096)),
    seed=maybe(st.integers(0, 2**64 - 1)),
    sampler=maybe(st.sampled_from(SAMPLERS)),
    schedule=maybe(st.sampled_from(SCHEDULES)),
    timestep_spacing=maybe(st.sampled_from(SPACINGS)),
    clip_skip=maybe(st.integers(0, 30)),
    guidance_rescale=maybe(st.floats(0, 1)),
    eta=maybe(st.floats(0, 2)),
    reuse_interval=st.integers(1, 100),
    token_merging_ratio=st.floats(0, 0.75),
    guidance_interval=maybe(st.floats(0, 0.5).map(lambda low: f"{low},{low + 0.5}")),
    strength=maybe(st.floats(0, 1)),
    parse_weights=st.booleans(),
    noise_source=st.sampled_from(NOISE_SOURCES),
)


@given(WORDS, OPTIONS, maybe(WORDS))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_text_comes_back_exactly(prompt: str, options: GenerateOptions, model: str | None) -> None:
    # A sampler without a schedule says the normal one, as older texts do.
    if options.sampler is not None and options.schedule is None:
        options = options.replace(schedule="normal")
    read = from_text(to_text(prompt, options, model))
    assert (read.prompt, read.options, read.model) == (prompt, options, model)
    assert read.other == {"Version": f"diptych {__version__}"}


def test_resolved_options_come_back() -> None:
    options = GenerateOptions(width=100).resolve({"guidance_scale": 4})
    assert from_text(to_text("a", options)).options == options


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".avif"])
@given(prompt=WORDS, options=OPTIONS.map(lambda o: o.resolve()))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_files_hold_their_settings(
    tmp_path: Path, suffix: str, prompt: str, options: GenerateOptions
) -> None:
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(encode(Made(prompt, options, "漢 model"), suffix))
    read = read_settings(path)
    assert (read.prompt, read.options, read.model) == (prompt, options, "漢 model")
    with Image.open(path) as image:
        image.load()
        assert image.size == (16, 24)


def test_png_holds_both_notations(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    made = Made(options=GenerateOptions(seed=2**64 - 1).resolve())
    path.write_bytes(encode(made, ".png"))
    with Image.open(path) as image:
        assert image.info["parameters"] == to_text(made.prompt, made.options, made.model)
        told = json.loads(image.info["diptych"])
        assert image.getpixel((0, 0)) == (0, 128, 128)
    assert told == {"prompt": "a cat", "model": "default", "options": as_dict(made.options)}
    assert GenerateOptions(**told["options"]) == made.options


def test_settings_can_be_left_out(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(encode(Made(), suffix, metadata=False))
        with pytest.raises(BadInput, match="holds no settings"):
            read_settings(path)


def test_quality_changes_the_size() -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    for suffix in (".jpg", ".webp"):
        small, large = (len(encode(Made(image=image), suffix, quality=q)) for q in (10, 95))
        assert small < large
    exact = encode(Made(image=image), ".webp", quality=100)
    with Image.open(io.BytesIO(exact)) as read:
        assert read.convert("RGB").tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (b"UNICODE\0", A1111.encode("utf-16-be")),
        (b"UNICODE\0", A1111.encode("utf-16-le")),
        (b"UNICODE\0", A1111.encode("utf-16")),
        (b"ASCII\0\0\0", A1111.encode()),
        (b"", A1111.encode()),
    ],
)
def test_comments_as_others_write_them(tmp_path: Path, code: bytes, text: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = code + text
    path = tmp_path / "a.jpg"
    Made().image.save(path, exif=exif.tobytes())
    assert read_settings(path) == from_text(A1111)


def test_a_json_chunk_that_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    for told in ("", "[]", "{}", '{"prompt": 3, "options": {}}', "[" * 100_000,
                 '{"prompt": "b", "options": {"seed": -1}}',
                 '{"prompt": "b", "options": {"seed": ' + "9" * 9000 + "}}"):  # fmt: skip
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", "a cat\nSteps: 3, Seed: 1, Size: 64x64")
        chunks.add_text("diptych", told)
        Made().image.save(tmp_path / "a.png", pnginfo=chunks)
        assert read_settings(tmp_path / "a.png").prompt == "a cat"


def test_what_cannot_be_read_or_written_is_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(encode(Made(), ".png")[:40])
    for name in ("a.png", "cut.png", "missing.png", "."):
        with pytest.raises(BadInput, match=r"\w") as caught:
            read_settings(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadImage, match="it is no PNG"):
        read_settings(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"\.gif is no kind of picture to write"):
        encode(Made(), ".gif")
    with pytest.raises(BadInput, match="quality is 0: give a whole number from 1 to 100"):
        encode(Made(), ".jpg", quality=0)
    encode(Made("x" * 40_000), ".jpg")
    assert "too long for a JPEG file" in caplog.text


# Saving ---------------------------------------------------------------------------------------


def saved_as(made: Made, path: Path) -> Path:
    return GeneratedImage(made.image, 7, made.prompt, made.options, made.model).save(path)


def test_saved_pictures_tell_how_they_were_made(tmp_path: Path) -> None:
    made = Made(options=GenerateOptions(seed=3).resolve())
    for name in ("a.png", "b.JPG", "c.webp"):
        read = read_settings(saved_as(made, tmp_path / name))
        assert (read.prompt, read.options, read.model) == (made.prompt, made.options, made.model)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.png"
    saved_as(Made(), path)
    before = path.read_bytes()
    large = Made(image=Image.effect_noise((400, 400), 90).convert("RGB"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BadInput, match=r"a\.png: the picture cannot be written \(.+\)$"):
            saved_as(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]
    assert len(saved_as(large, path).read_bytes()) > 4096
