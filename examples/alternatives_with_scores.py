"""Print several captions of one picture, and how sure the model is of each and of its words."""

import argparse
import math
from pathlib import Path

from diptych import Captioner

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photo", nargs="?", default=Path(__file__).parent / "photos" / "coffee.jpg")
parser.add_argument("--model", default="default")
arguments = parser.parse_args()

captioner = Captioner.load(arguments.model)

print("beam search: the most probable captions, often much alike")
best = captioner.caption(arguments.photo, num_beams=5, num_return_sequences=3)
for caption in (best, *best.alternatives):
    print(f"  {caption.probability:.3f}  {caption.score:7.3f}  {caption.text}")

print("sampling: more varied, less sure")
drawn = captioner.caption(arguments.photo, top_p=0.9, num_return_sequences=3, seed=1)
for caption in (drawn, *drawn.alternatives):
    print(f"  {caption.probability:.3f}  {caption.score:7.3f}  {caption.text}")

print("the best one, token by token")
for token_id, logprob in zip(best.token_ids, best.token_logprobs, strict=True):
    token = captioner.tokenizer.decode([token_id]) or "(end)"
    print(f"  {math.exp(logprob):.3f}  {token!r}")
