"""Write `docs/benchmarks.md` from what the scripts recorded.

    python benchmarks/render.py [--check]

A table for each script and machine: of every case the figures recorded last. `--check` changes
nothing, and fails where the page is not what the records give.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Every figure comes from a script in `benchmarks/` that runs both sides on the same weights and
inputs, taking turns in one process, and prints medians; a ratio is the peer's time by ours. The
records are in `benchmarks/results/`, with machine, versions and commit; this page is written from
them by `python benchmarks/render.py`, so it holds nothing that was not measured. Where a row is
missing, it was not. All ran on CPUs, but for the rows that name a card. `diptych bench`
prints such a table for your own machine.

The machines without a GPU were shared with other work. Trust the ratios of one table, less its
seconds, and do not compare seconds between tables.
"""
# What the records alone do not say.
NOTES = {
    "caption_speed": """`int8-fixed` has fixed ranges in the encoder (`--calibration`). On the Intel
Xeon, `openvino-int8` and `openvino-int8-fixed` computed the rest in bfloat16, as `auto` did in
OpenVINO when they were measured; now it computes in float32 there, unless bfloat16 is asked for.

Tasks that name transformers 4 ran in an environment of its own, for optimum asks for that version.
There `onnx-int8-fixed` is 2.0, 2.5 and 1.7 times as fast as optimum's int8 (greedy, 4 beams, a
batch of 8); `onnx-int8` 1.4, 1.9 and 0.8 times: it rounds each row by itself, so that pictures of
a batch do not change each other's captions. optimum rounds a batch by one scale.

Rows *embedded default* of the AMD EPYC are of the first default captioner.
""",
    "fewer_steps": """`default` is the first default generator here; the one that ships draws 91 %
of the objects and colours right.
""",
    "generate_speed": """Rows *embedded default* of the AMD EPYC are of the first default generator.

Across the types, on the Intel Xeon: a step of ours in bfloat16 takes
0.24 of diffusers' in float32 (4.2 times as fast), decoding 0.19 (5.1 times); pictures are at 42 dB.
The part int8 is OpenVINO: the UNet's products in 8 bits, the rest in bfloat16; half of its step is
attention. Its random inputs of a step are unlike the prompts that fixed the ranges, its picture is
at 32.7 dB of diffusers' in float32. The part cuda is a whole picture on a GPU whose processor was
slow that day (see below): ours hardly waits for it, and 0.22 of the 0.25 s are the 20 steps.
""",
    "gpu_speed": """Three runs of minutes on cards of one kind, with weights of random numbers.

Where a case was run twice, the later run stands; what it had no time for is of an earlier one.

- **Faster than the reference:** the UNet step of SD 1.5, a LoRA step, captions of one picture.
  The third run launched the step as one CUDA graph: 3.3 times as fast as ours without, 4.2 times
  as fast as diffusers. How much it gains hangs on the processor, which launches the kernels
  otherwise: it was slow in that run, and diffusers took 0.049 s. Beside the 0.026 s of another
  run it would be 2.2 times. The whole picture of 20 steps is above, in `generate_speed.py`.
- **As fast:** decoding a picture (1.01 times diffusers' speed). It was 0.80 before the
  autoencoder was laid out channels first.
- **Slower:** greedy captions of 32 pictures, 0.82 times transformers' speed in the second run, on
  a machine whose processor took 1.3 to 1.7 times as long for transformers' own captions as in the
  first, where it was 0.92. Between the two runs the search for words moved to the card; that it
  got no better says that the search was not what it waits for. What it is, is not known.
- **Of the code before:** 32 pictures with 4 beams (0.36 times transformers'). Whole rows of logits
  went to the CPU at every word then. Later runs had no time left for it.
- **Not measured:** compiled blocks, diffusers compiled, and a LoRA step with gradient
  checkpointing: there was no time for them. Compiling took more than 60 s.

The mebibytes are those of the weights, and of what a call takes beside them.
""",
}
# What tells one case from another; the rest are its figures.
CASES = (
    *("part", "model", "task", "work", "side", "runtime", "way", "dtype", "size", "batch"),
    *("device", "guidance_scale"),
)
NAMES = {
    "median_s": "median s",
    "min_s": "fastest s",
    "speed_ratio": "times as fast",
    "same_tokens": "same tokens",
    "wall_s": "wall s",
    "peak_mib": "peak MiB",
    "weights_mib": "weights MiB",
    "beside_mib": "beside them MiB",
    "psnr_db": "PSNR dB",
    "guidance_scale": "guidance",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="fail where the page would change")
    check = parser.parse_args().check
    page = render()
    if not check:
        PAGE.write_text(page, "utf-8")
    elif not PAGE.is_file() or PAGE.read_text("utf-8") != page:
        sys.exit(f"{PAGE.name} is not what the records give: run python benchmarks/render.py")


def render(results: Path = HERE / "results") -> str:
    """Return the page for the records in `results`."""
    sections = [HEAD]
    for path in sorted(results.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        sections.append("\n".join(_section(path.stem, rows)))
    return "\n".join(sections)


def _section(script: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"## {_question(script)}\n"
    yield f"`benchmarks/{script}.py`\n"
    if script in NOTES:
        yield NOTES[script]
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        machines.setdefault(_machine(row["machine"]), []).append(row)
    for machine, own in machines.items():
        latest: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in own:
            flat = _flat({word: value for word, value in row.items() if word != "machine"})
            peers = [word for word in flat if word.startswith("speed_ratio to ")]
            latest[(*(str(flat.get(word)) for word in CASES), *peers)] = flat
        commits = sorted({str(row["machine"].get("commit", "unknown")) for row in own})
        yield f"### {machine}\n"
        yield f"Commits {', '.join(commits)}; {_versions(own[-1]['machine'])}.\n"
        groups: dict[str, list[dict[str, Any]]] = {}
        for flat in latest.values():
            groups.setdefault(str(flat.get("part", "")), []).append(flat)
        for group in groups.values():
            yield from _table(group)
            yield ""


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    words = [word for row in rows for word in row]
    columns = sorted(dict.fromkeys(words), key=lambda word: (word not in CASES, words.index(word)))
    yield f"| {' | '.join(NAMES.get(word, word.replace('_', ' ')) for word in columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(word)) for word in columns)} |"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the figures of each side as columns of their own."""
    flat: dict[str, Any] = {}
    for word, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{word} {inner}": each for inner, each in value.items()}
        else:
            flat[word] = value
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _machine(machine: Mapping[str, Any]) -> str:
    instructions = machine.get("instructions")
    told = f", {', '.join(instructions)}" if instructions else ""
    return f"{machine['processor']}, {machine['cores']} cores{told}"


def _versions(machine: Mapping[str, Any]) -> str:
    left_out = ("processor", "cores", "commit", "instructions", "pillow")
    return ", ".join(f"{word} {value}" for word, value in machine.items() if word not in left_out)


def _question(script: str) -> str:
    """Return the first sentence of a script's docstring: what it asks."""
    path = HERE / f"{script}.py"
    told = ast.get_docstring(ast.parse(path.read_text("utf-8"))) if path.is_file() else None
    return (told or script).splitlines()[0]


if __name__ == "__main__":
    main()
