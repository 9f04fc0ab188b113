"""Write a text file beside every picture of a folder: photo.jpg gets photo.txt.

A text that is there already stays as it is, so a run that was stopped can be started again.
"""

import argparse
from pathlib import Path

from diptych import Captioner

PICTURES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "photos")
parser.add_argument("--model", default="default")
arguments = parser.parse_args()

pictures = [p for p in sorted(arguments.folder.rglob("*")) if p.suffix.lower() in PICTURES]
wanted = [picture for picture in pictures if not picture.with_suffix(".txt").exists()]
print(f"{len(pictures)} pictures, {len(wanted)} without a text")

captioner = Captioner.load(arguments.model)
for picture, caption in zip(wanted, captioner.captions(wanted), strict=True):
    if caption.error is not None:
        print(caption.error)
        continue
    try:
        # Mode x fails where a file appeared meanwhile (photo.png beside photo.jpg, say).
        with picture.with_suffix(".txt").open("x", encoding="utf-8") as file:
            file.write(caption.text + "\n")
    except FileExistsError as error:
        print(f"{error.filename}: is there already, {picture.name} gets no text")
    else:
        print(f"{picture.name}: {caption.text}")
