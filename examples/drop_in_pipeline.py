"""Call the captioner the way `transformers.pipeline("image-to-text")` was called."""

import argparse
from pathlib import Path

from PIL import Image

from diptych import pipeline

PHOTOS = Path(__file__).parent / "photos"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="default")
arguments = parser.parse_args()

captioner = pipeline("image-to-text", model=arguments.model)

one = captioner(str(PHOTOS / "chelsea.jpg"))
print("a path:", one)

several = captioner([Image.open(PHOTOS / "coffee.jpg"), str(PHOTOS / "rocket.jpg")], batch_size=2)
print("a list:", several)

choices = captioner(
    str(PHOTOS / "astronaut.jpg"),
    max_new_tokens=12,
    generate_kwargs={"num_beams": 4, "num_return_sequences": 2},
)
print("beams:", choices)

photos = (str(path) for path in sorted(PHOTOS.glob("*.jpg")))
for answer in captioner(photos):
    print("a generator:", answer[0]["generated_text"])
