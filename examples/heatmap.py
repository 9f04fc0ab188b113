"""Draw where the model looked when it chose each word of its caption."""

import argparse
from pathlib import Path

from diptych import Captioner
from diptych.images import contact_sheet, open_image, overlay_heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photo", nargs="?", default=Path(__file__).parent / "photos" / "chelsea.jpg")
parser.add_argument("--model", default="default")
parser.add_argument("--out", default="heatmap.png")
arguments = parser.parse_args()

caption = Captioner.load(arguments.model).caption(arguments.photo)
print(caption.text)

photo = open_image(arguments.photo)
photo.thumbnail((320, 320))
panels = []
for number, word in enumerate(caption.words):
    weights = caption.heatmap(number)  # by number, because a word may stand there twice
    top, left = divmod(int(weights.argmax()), weights.shape[1])
    print(f"{word:12} looked most at row {top}, column {left} of {weights.shape[0]}")
    panels.append(overlay_heatmap(photo, weights, label=word))

if panels:
    contact_sheet(panels, columns=4).save(arguments.out)
    print(f"drawn in {arguments.out}")
