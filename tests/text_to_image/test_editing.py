"""Pictures made from pictures, around a generator that is plain functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych import GenerateOptions, ImageGenerator
from diptych.errors import BadImage, BadInput
from fake_generator import DOWN, SIDE, FakeNetwork, make_generator


@pytest.fixture
def generator() -> ImageGenerator:
    return make_generator()


def picture(width: int = SIDE, height: int = SIDE, mode: str = "RGB", seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(
        mode
    )


def part(width: int = SIDE, height: int = SIDE) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, width // 2, height // 2))
    return mask


def mean(image: Image.Image) -> list[float]:
    return np.asarray(image.convert("RGB"), float).mean((0, 1)).tolist()


# Image to image ---------------------------------------------------------------------------------


def test_a_size_is_told_once_and_as_it_is_made(
    generator: ImageGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = 5 * DOWN - 1  # the nearest is above, and what is drawn below
    made = generator.image_to_image(picture(), "red", width=wanted, strength=0.5)
    (note,) = made.notes
    assert note.startswith(f"width {wanted} became {made.options.width}: ")
    assert made.options.width == 4 * DOWN and made.image.width == 4 * DOWN
    assert f"became {5 * DOWN}" not in caplog.text


def test_strength_leads_from_the_picture_to_the_words(generator: ImageGenerator) -> None:
    blue = Image.new("RGB", (SIDE, SIDE), "blue")
    still = generator.image_to_image(blue, "red", strength=0)
    assert np.allclose(mean(still.image), [0, 0, 255], atol=1)
    free = generator.image_to_image(blue, "red", strength=1, seed=1)
    # The last of DDIM's sigmas is not 0: a little noise is left.
    assert np.allclose(mean(free.image), [255, 0, 0], atol=6)
    assert still.options.strength == 0


@pytest.mark.parametrize(
    ("given", "asked", "made"),
    [
        ((SIDE, SIDE), {}, (SIDE, SIDE)),
        ((37, 53), {}, (32, 48)),  # down to whole latents, as in diffusers
        ((640, 480), {}, (32, 24)),  # more than four times what it was trained with
        ((640, 480), {"width": 64}, (64, 48)),
        ((640, 480), {"height": 64}, (80, 64)),
        ((640, 480), {"width": 48, "height": 48}, (48, 48)),
        ((1, 1), {}, (16, 16)),
    ],
)
def test_sizes(generator: ImageGenerator, given: Any, asked: Any, made: Any) -> None:
    result = generator.image_to_image(picture(*given), "red", **asked)
    assert result.image.size == made
    assert bool(result.notes) == (given == (640, 480) and not asked)


def test_one_for_one_and_a_list_for_a_list(generator: ImageGenerator) -> None:
    pictures = [picture(), picture(64, 32)]
    made = generator.image_to_image(pictures, "red", seed=5)
    assert isinstance(made, list)
    assert [each.image.size for each in made] == [(32, 32), (64, 32)]
    assert [each.seed for each in made] == [5, 6]
    two = generator.image_to_image(pictures[0], ["red", "blue"])
    assert isinstance(two, list) and [each.prompt for each in two] == ["red", "blue"]
    again = generator.image_to_image(pictures[0], "red", num_images_per_prompt=2)
    assert isinstance(again, list) and len(again) == 2
    with pytest.raises(BadInput, match="there are 2 pictures and 3 prompts"):
        generator.image_to_image(pictures, ["a", "b", "c"])


def test_a_broken_picture_spares_the_others(generator: ImageGenerator, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    made = generator.image_to_image([picture(), tmp_path / "broken.png", picture()], "red")
    assert [each.error is None for each in made] == [True, False, True]
    with pytest.raises(BadImage):
        generator.image_to_image(tmp_path / "broken.png", "red")
    with pytest.raises(BadImage):
        generator.image_to_image([tmp_path / "broken.png"], "red", on_error="raise")


def test_options_of_generation_are_taken_over(generator: ImageGenerator) -> None:
    made = generator.image_to_image(picture(), "red", GenerateOptions(seed=9, strength=0.4))
    assert (made.seed, made.options.strength) == (9, 0.4)
    assert generator.image_to_image(picture(), "red").options.strength == 0.8
    assert generator.inpaint(picture(), part(), "red").options.strength == 1.0


def test_no_step_at_all_is_told(generator: ImageGenerator) -> None:
    made = generator.image_to_image(picture(), "red", strength=0.1, num_inference_steps=5)
    (note,) = made.notes
    assert note.startswith("strength 0.1 of 5 steps is no step at all")


def test_noise_of_another_size_is_refused(generator: ImageGenerator) -> None:
    noise = np.zeros((1, 4, 2, 2), np.float32)
    with pytest.raises(BadInput, match=r"noise of the shape \[4, 2, 2\], but this picture"):
        generator.image_to_image(picture(), "red", latents=noise)


def test_steps_are_those_that_strength_leaves(generator: ImageGenerator) -> None:
    words: dict[str, Any] = {"image": picture(), "num_inference_steps": 10, "sampler": "euler"}
    steps = list(generator.denoising_steps("red", strength=0.35, **words))
    assert [step.total for step in steps] == [3] * 3
    assert steps[-1].result().image.size == (SIDE, SIDE)


# Inpainting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"strength": 0.5},
        {"padding_mask_crop": 3},
        {"width": 48, "height": 16},
        {"width": 48, "height": 16, "resize_mode": "crop"},
        {"width": 48, "height": 16, "resize_mode": "pad"},
        {"soft_mask": True},
        {"mask_blur": 0},
        {"invert_mask": True},
        {"extend": "left=9,bottom=5"},
    ],
)
@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (37, 53)), ("RGBA", (32, 32)), ("L", (200, 90))]
)
def test_pixels_outside_are_the_same(
    channels: int, words: dict[str, Any], mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    generator = make_generator(unet={"in_channels": channels})
    source, mask = picture(*size, mode), part(*size)
    made = generator.inpaint(source, mask, "green", **words)
    made.save(tmp_path / "made.png")
    with Image.open(tmp_path / "made.png") as read:
        found = np.asarray(read)
    kept = np.asarray(source.convert("RGBA" if mode == "RGBA" else "RGB"))
    outside = np.asarray(mask) == 0
    if words.get("invert_mask"):
        outside = ~outside
    if "extend" in words:
        assert made.image.size == (size[0] + 9, size[1] + 5)
        found = found[:-5, 9:]
        outside[:, :8], outside[-8:] = False, False
    assert np.array_equal(found[outside], kept[outside])
    if words.get("resize_mode") != "crop":
        middle = np.s_[size[1] // 3, size[0] // 3]
        if not words.get("invert_mask"):
            assert not np.array_equal(found[middle], kept[middle])


def test_16_bits_are_kept(generator: ImageGenerator, tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    made = generator.inpaint(Image.fromarray(deep), part(), "red")
    outside = np.asarray(part()) == 0
    assert np.array_equal(np.asarray(made.image)[outside], deep[outside])
    with Image.open(made.save(tmp_path / "made.jpg")) as shallow:
        shallow.load()


def test_an_empty_mask_and_a_full_one(generator: ImageGenerator) -> None:
    source = picture(37, 53)
    made = generator.inpaint(source, Image.new("L", source.size), "red")
    assert np.array_equal(np.asarray(made.image), np.asarray(source))
    assert made.notes == ("the mask is empty: the picture comes back as it was",)
    full = generator.inpaint(picture(), Image.new("L", (SIDE, SIDE), 255), "red", seed=1)
    plain = generator.generate("red", seed=1)
    assert np.array_equal(np.asarray(full.image), np.asarray(plain.image))


def test_an_empty_mask_in_every_mode(generator: ImageGenerator) -> None:
    for words in ({"padding_mask_crop": 8}, {"soft_mask": True}, {"strength": 0.5}):
        made = generator.inpaint(picture(), Image.new("L", (SIDE, SIDE)), "red", **words)
        assert np.array_equal(np.asarray(made.image), np.asarray(picture()))


def test_greys_say_how_much_may_change() -> None:
    """A pixel of 0.3 is free for the last 0.3 of the steps: it stays nearer to what it was."""
    seen: list[Any] = []

    def unet(latents: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        seen.append(latents)
        return (np.zeros_like(latents[:, :4]),)

    inputs = {"latents": "", "timestep": "", "encoder_hidden_states": ""}
    generator = make_generator(networks={"unet": FakeNetwork(unet, inputs)})
    ramp = np.repeat(np.linspace(0, 255, SIDE // DOWN).astype(np.uint8), DOWN)
    mask = np.tile(ramp, (SIDE, 1))
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    made = generator.inpaint(
        grey, mask, "red", soft_mask=True, num_inference_steps=10, sampler="ddim", mask_blur=0
    )
    change = np.abs(np.asarray(made.image, int) - 128).mean((0, 2)).reshape(-1, DOWN).mean(1)
    assert change[0] == 0 and change[-1] > 0
    hard = generator.inpaint(grey, mask, "red", num_inference_steps=10, sampler="ddim", mask_blur=0)
    other = np.abs(np.asarray(hard.image, int) - 128).mean((0, 2)).reshape(-1, DOWN).mean(1)
    assert other[1] == 0 and change[1] > 0


def test_a_mask_for_each_picture(generator: ImageGenerator) -> None:
    one, other = part(), Image.new("L", (SIDE, SIDE))
    made = generator.inpaint([picture(), picture()], [one, other], "red")
    assert np.array_equal(np.asarray(made[1].image), np.asarray(picture()))
    assert not np.array_equal(np.asarray(made[0].image), np.asarray(picture()))
    several = generator.inpaint(picture(), [one, other], "red")
    assert isinstance(several, list) and len(several) == 2
    # The empty one first: it takes no step, and must not decide so for its neighbour.
    still, changed = generator.inpaint(picture(), [other, one], "red", seed=4)
    assert np.array_equal(np.asarray(still.image), np.asarray(picture()))
    alone = generator.inpaint(picture(), one, "red", seed=5)
    assert np.array_equal(np.asarray(changed.image), np.asarray(alone.image))


def test_an_open_file_is_one_picture(generator: ImageGenerator, tmp_path: Path) -> None:
    picture().save(tmp_path / "one.png")
    with (tmp_path / "one.png").open("rb") as file:
        made = generator.image_to_image(file, "red", strength=0)
    assert made.image.size == (SIDE, SIDE)


def test_words_and_pictures_may_come_one_by_one(generator: ImageGenerator) -> None:
    made = generator.image_to_image(picture(), (word for word in ("red", "blue")))
    assert [each.prompt for each in made] == ["red", "blue"]
    made = generator.image_to_image((picture() for _ in range(2)), ["red", "blue"])
    assert [each.prompt for each in made] == ["red", "blue"]
    with pytest.raises(BadInput, match="there are more pictures than the 1 prompts"):
        generator.image_to_image((picture() for _ in range(2)), ["red"])


def test_a_long_strip_is_drawn_smaller(generator: ImageGenerator) -> None:
    """A side that no model draws: 4,100 pixels."""
    source = picture(4100, 1)
    mask = Image.new("L", source.size)
    mask.paste(255, (4, 0, 2000, 1))
    made = generator.inpaint(source, mask, "red")
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(made.image)[outside], np.asarray(source)[outside])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"mask_image": None}, "nothing says where to paint: give a mask, or sides to extend"),
        ({"extend": "up=3"}, "extend is 'up=3': give sides and pixels"),
        ({"extend": "left=0"}, "at least one side more than 0 pixels"),
        ({"mask_from": "alpha"}, "the mask has no transparency"),
        ({"mask_blur": -1}, "mask_blur is -1: give a whole number from 0 to 256"),
        ({"strength": 1.5}, "strength is 1.5: give a number from 0 to 1"),
        ({"mask_padding": 3}, "mask_padding is not an option of inpaint"),
    ],
)
def test_mistakes_get_a_clear_sentence(
    generator: ImageGenerator, words: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInput, match=told.replace("(", "\\(")):
        generator.inpaint(**{"image": picture(), "mask_image": part(), "prompt": "red", **words})


def test_a_mask_without_a_picture(generator: ImageGenerator) -> None:
    with pytest.raises(BadInput, match="mask_image is given without an image"):
        list(generator.follow(["red"], mask_image=part()))
