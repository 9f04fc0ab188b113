"""Print the words of a caption as they are found."""

import argparse
import time
from pathlib import Path

from diptych import Captioner

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photo", nargs="?", default=Path(__file__).parent / "photos" / "rocket.jpg")
parser.add_argument("--model", default="default")
parser.add_argument("--num-beams", type=int, default=1, help="more beams settle words later")
arguments = parser.parse_args()

captioner = Captioner.load(arguments.model)

start = time.perf_counter()
for piece in captioner.stream(arguments.photo, num_beams=arguments.num_beams):
    seconds = time.perf_counter() - start
    print(f"{seconds:7.3f} s  {piece!r}", flush=True)

print(captioner.caption(arguments.photo, num_beams=arguments.num_beams).text)
