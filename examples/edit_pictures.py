"""Repaint the middle of a photo, give it the style of another, and show both on one sheet."""

import argparse
from pathlib import Path

from PIL import Image

from diptych import ImageGenerator
from diptych.images import contact_sheet, open_image

photos = Path(__file__).parent / "photos"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("drawn", nargs="*", type=Path, help="more pictures for the sheet")
parser.add_argument("--photo", type=Path, default=photos / "coffee.jpg")
parser.add_argument("--style", type=Path, default=photos / "rocket.jpg")
parser.add_argument("--model", default="default")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", type=Path, default=Path("edited.png"))
arguments = parser.parse_args()

generator = ImageGenerator.load(arguments.model)
photo, style = open_image(arguments.photo), open_image(arguments.style)
photo.thumbnail((160, 160))

mask = Image.new("L", photo.size)
width, height = photo.size
mask.paste(255, (width // 4, height // 5, width * 3 // 4, height * 4 // 5))
repainted = generator.inpaint(photo, mask, "a photo of a sunflower", seed=1)
stylized = generator.style_transfer(
    photo, style, preset="style", num_inversion_steps=arguments.steps
)
panels = {"photo": photo, "repainted": repainted.image}
panels |= {"style": style, "stylized": stylized.image}
panels |= {path.stem: open_image(path) for path in arguments.drawn}
sheet = contact_sheet([*panels.values()], columns=4, max_side=160, labels=[*panels])
sheet.save(arguments.out)
print(f"{len(panels)} pictures: {arguments.out}")
