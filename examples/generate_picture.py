"""Draw a prompt a few times, and read back from a file how its picture was made."""

import argparse
from pathlib import Path

from diptych import ImageGenerator
from diptych.images import contact_sheet
from diptych.text_to_image.infotext import read_settings

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
parser.add_argument("--model", default="default")
parser.add_argument("--count", type=int, default=4)
parser.add_argument("--steps", type=int, help="else what the model prefers")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--out", type=Path, default=Path("pictures"))
arguments = parser.parse_args()

generator = ImageGenerator.load(arguments.model)
arguments.out.mkdir(exist_ok=True)

made = []
prompts = [arguments.prompt] * arguments.count
for picture in generator.images(prompts, num_inference_steps=arguments.steps, seed=arguments.seed):
    path = picture.save(arguments.out / f"{picture.seed}.png")
    made.append(picture.image)
    print(f"{path}: {picture.image.width} x {picture.image.height}, seed {picture.seed}")

sheet = arguments.out / "sheet.png"
contact_sheet(made, columns=2).save(sheet)
print(f"all of them: {sheet}")

settings = read_settings(path)
again = generator.generate(settings.prompt, settings.options)
print("drawn again from the file alone, it is the same:", again.image == picture.image)
