"""Make the pictures of the guides with the default model, from the sample photos.

python docs/generate_pictures.py            with the model of the package
python docs/generate_pictures.py MODEL      with another: a folder, a file, or an id of the hub

Every seed is given, so the same model on the same machine makes the same pictures. Between
processors they differ by rounding, so no test compares them. It needs no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from diptych import ImageGenerator
from diptych.canvas import fit
from diptych.images import contact_sheet, open_image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "guides" / "pictures"
SIDE = 128
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
STYLE_STRENGTHS = (0.0, 0.3, 0.6, 1.0)


def main(arguments: list[str]) -> int:
    """Write every sheet; return the exit code."""
    if len(arguments) > 1 or any(each.startswith("-") for each in arguments):
        print(__doc__, file=sys.stderr)  # noqa: T201
        return 2
    generator = ImageGenerator.load(*arguments)
    FOLDER.mkdir(exist_ok=True)
    for make in (image_to_image, inpaint, style_transfer):
        path = FOLDER / f"{make.__name__.replace('_', '-')}.png"
        make(generator).save(path, optimize=True)
        print(f"{path.relative_to(ROOT)} written")  # noqa: T201
    return 0


def photo(name: str, width: int = SIDE) -> Image.Image:
    """Return the middle of a sample photo."""
    return fit(open_image(ROOT / "examples" / "photos" / f"{name}.jpg"), (width, SIDE), "crop")


def image_to_image(generator: ImageGenerator) -> Image.Image:
    """Show one photo on its way to the words."""
    coffee = photo("coffee")
    panels = {"photo": coffee}
    for strength in STRENGTHS:
        made = generator.image_to_image(
            coffee, "a photo of a sunflower", strength=strength, num_inference_steps=30, seed=7
        )
        panels[f"strength {strength:g}"] = made.image
    return contact_sheet([*panels.values()], len(panels), labels=[*panels])


def inpaint(generator: ImageGenerator) -> Image.Image:
    """Show a photo, a mask and what is painted there, and the photo extended."""
    coffee = photo("coffee")
    mask = Image.new("L", coffee.size)
    ImageDraw.Draw(mask).ellipse((34, 6, 92, 62), fill=255)
    painted = generator.inpaint(coffee, mask, "a photo of a sunflower", seed=7)
    rocket = photo("rocket", width=80)
    wider = generator.inpaint(rocket, prompt="a photo of a tulip", extend="right=48", seed=7)
    panels = {"photo": coffee, "mask": mask, "repainted": painted.image}
    panels |= {"narrow": rocket, "extended": wider.image}
    return contact_sheet([*panels.values()], len(panels), labels=[*panels])


def style_transfer(generator: ImageGenerator) -> Image.Image:
    """Show content and style, each before a row of what a preset makes by rising strength."""
    content, style = photo("coffee"), photo("rocket")
    panels, labels = [], []
    for preset, given, label in (("content", content, "content"), ("style", style, "style")):
        panels.append(given)
        labels.append(label)
        for strength in STYLE_STRENGTHS:
            made = generator.style_transfer(
                content, style, preset=preset, style_strength=strength, num_inversion_steps=25
            )
            panels.append(made.image)
            labels.append(f"preset {preset}, {strength:g}")
    return contact_sheet(panels, 1 + len(STYLE_STRENGTHS), labels=labels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
