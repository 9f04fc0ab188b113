"""Time our caption scores beside those of pycocoevalcap, and compare the values.

Both start from the same sentences, tokens separated by spaces, and run in turns in one process.
Prints one JSON line. Without `--captions` the sentences are drawn from a made-up vocabulary with
the word frequencies of speech, so that the script runs on a fresh clone.

    python benchmarks/caption_metrics.py --images 1000 --references 5 --repeats 7
    python benchmarks/caption_metrics.py --captions captions.tar
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import version

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from diptych.evaluation.caption_metrics import (
    CiderD,
    bleu,
    cider_d,
    rouge_l,
    score_captions,
    tokenize_words,
)

Captions = tuple[list[str], list[list[str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--captions", help="a caption archive; its train split is used")
    options = parser.parse_args()
    draw = read_captions if options.captions else make_captions
    hypotheses, references = draw(options)
    print(json.dumps(describe(options) | compare(hypotheses, references, options.repeats)))


def describe(options: argparse.Namespace) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "benchmark": "caption_metrics",
        "data": options.captions or "made up",
        "images": options.images,
        "references": options.references,
        "repeats": options.repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "pycocoevalcap": version("pycocoevalcap"),
        "commit": commit.stdout.strip(),
    }


def compare(
    hypotheses: list[str], references: list[list[str]], repeats: int
) -> dict[str, dict[str, float]]:
    """Time each metric of ours beside theirs; `ratio` above 1 means ours is faster."""
    results = dict(enumerate([sentence] for sentence in hypotheses))
    truths = dict(enumerate(references))

    def split() -> tuple[list[list[str]], list[list[list[str]]]]:
        groups = [[sentence.split() for sentence in group] for group in references]
        return [sentence.split() for sentence in hypotheses], groups

    theirs: dict[str, Callable[[], float]] = {
        "bleu": lambda: Bleu(4).compute_score(truths, results, verbose=0)[0][3],
        "rouge_l": lambda: Rouge().compute_score(truths, results)[0],
        "cider_d": lambda: Cider().compute_score(truths, results)[0],
    }
    ours: dict[str, Callable[[], float]] = {
        "bleu": lambda: bleu(*split()).bleu_4,
        "rouge_l": lambda: rouge_l(*split()).mean,
        "cider_d": lambda: cider_d(*split()).mean,
    }
    together = theirs.copy()
    ours["all"] = lambda: score_captions(hypotheses, references, tokenizer=str.split).cider_d
    # The last value is compared, here CIDEr-D as in ours.
    theirs["all"] = lambda: [score() for score in together.values()][-1]
    rows = {name: time_in_turns(ours[name], theirs[name], repeats) for name in ours}
    return rows | {"training": time_samples(*split(), repeats)}


def time_in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int
) -> dict[str, float]:
    difference = abs(ours() - theirs())  # the warm-up
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, times in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    mine, other = map(statistics.median, seconds)
    return {
        "ours_s": round(mine, 4),
        "ours_min_s": round(min(seconds[0]), 4),
        "pycocoevalcap_s": round(other, 4),
        "pycocoevalcap_min_s": round(min(seconds[1]), 4),
        "ratio": round(other / mine, 2),
        "difference": float(f"{difference:.1e}"),
    }


def time_samples(
    hypotheses: list[list[str]], references: list[list[list[str]]], repeats: int
) -> dict[str, float]:
    """Time CiderD.score, where the references are counted once for many samples."""
    scorer = CiderD(references)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        scorer.score_all(hypotheses)
        seconds.append(time.perf_counter() - start)
    return {"samples_per_s": round(len(hypotheses) / statistics.median(seconds))}


def make_captions(options: argparse.Namespace) -> Captions:
    draw = random.Random(0)
    vocabulary = [f"word{rank}" for rank in range(4000)]
    weights = [1.0 / (rank + 3) for rank in range(4000)]

    def sentence() -> str:
        return " ".join(draw.choices(vocabulary, weights, k=draw.randint(6, 17)))

    images = range(options.images)
    references = [[sentence() for _ in range(options.references)] for _ in images]
    return [sentence() for _ in images], references


def read_captions(options: argparse.Namespace) -> Captions:
    """Let the next photo's first caption be the hypothesis: fluent and mostly wrong."""
    with tarfile.open(options.captions) as tar:
        table = tar.extractfile("captions.jsonl")
        if table is None:
            sys.exit(f"{options.captions}: captions.jsonl is not a file")
        rows = [json.loads(line) for line in table.read().decode().splitlines()]
    groups = [
        [" ".join(tokenize_words(caption)) for caption in row["captions"]]
        for row in rows
        if row["split"] == "train"
    ][: options.images + 1]
    references = [group[: options.references] for group in groups[:-1]]
    return [group[0] for group in groups[1:]], references


if __name__ == "__main__":
    main()
