"""The command line as a person meets it: exit codes and streams.

Real processes where streams, signals or the start matter; `told` calls the same in this one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.main import get_command

import diptych
from command_line import Done, call
from diptych import Captioner
from diptych.cli import app
from diptych.cli.verbs import VERBS
from tiny_models import make_captioner, make_photo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a tiny model: the command line then needs no torch and starts fast."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    make_captioner(checkpoint, 3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    Captioner.load(checkpoint).export(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for seed, name in enumerate(["a.png", "b.jpg", "sub/c.webp"]):
        make_photo(seed).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def run(
    *arguments: object, stdin: bytes = b"", **options: object
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "diptych", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
        **options,  # type: ignore[call-overload]
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Return `diptych` as a function of its arguments."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    return partial(call, monkeypatch, capsys)


def test_one_photo_prints_its_caption_and_nothing_else(model: Path, photos: Path) -> None:
    done = run("caption", photos / "a.png", "--model", model)
    expected = Captioner.load(model).caption(photos / "a.png").text
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_folder_glob_and_stdin(told: Callable[..., Done], model: Path, photos: Path) -> None:
    folder = told("caption", photos, "--model", model)
    assert folder.code == 0
    assert [line.split(": ")[0] for line in folder.out.splitlines()] == [
        str(photos / name) for name in ("a.png", "b.jpg", "sub/c.webp")
    ]
    glob = told("caption", f"{photos}/*.[pj]*g", "--model", model)
    assert glob.out.splitlines() == folder.out.splitlines()[:2]
    piped = run("caption", "-", "--model", model, stdin=(photos / "a.png").read_bytes())
    assert folder.out.startswith(f"{photos / 'a.png'}: {piped.stdout.strip()}")


def test_json_and_jsonl(told: Callable[..., Done], model: Path, photos: Path) -> None:
    lines = told("caption", photos, "-m", model, "-f", "jsonl", "--num-beams", 2).out
    records = [json.loads(line) for line in lines.splitlines()]
    assert len(records) == 3
    assert {"file", "text", "probability", "score", "token_ids", "seconds"} <= records[0].keys()
    whole = json.loads(told("caption", photos, "-m", model, "-f", "json", "--num-beams", 2).out)
    assert [r["text"] for r in whole] == [r["text"] for r in records]
    several = told(
        "caption", photos / "a.png", "-m", model, "-f", "jsonl", "--num-beams", 3,
        "--num-return-sequences", 3,
    )  # fmt: skip
    assert len(json.loads(several.out)["alternatives"]) == 2


def test_a_broken_file_never_loses_the_others(
    told: Callable[..., Done], model: Path, photos: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff broken")
    done = run(
        "caption", photos / "a.png", broken, tmp_path / "gone.png", photos / "b.jpg", "-m", model
    )
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 2
    assert "broken.jpg" in done.stderr and "gone.png" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    records = told("caption", broken, photos / "a.png", "-m", model, "-f", "json")
    assert ["error" in record for record in json.loads(records.out)] == [True, False]
    assert told("caption", broken, "-m", model).code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["caption"], 2, "paths"),
        (["caption", "x.png", "--num-beans", "3"], 2, "--num-beans"),
        (["caption", "x.png", "--model", "no-such-model"], 1, "no-such-model"),
        (["caption", "PHOTO", "--num-beams", "0"], 2, "num_beams"),
        (["caption", "PHOTO", "--early-stopping", "maybe"], 2, "early_stopping"),
        (["caption", "PHOTO", "--runtime", "abacus"], 2, "abacus"),
        (["caption", "PHOTO", "--top-p", "0.5", "--num-beams", "4"], 2, "top_p"),
        (["caption", "nothing-*.png"], 2, "nothing-*.png"),
        (["caption", "https://example.com/a.png"], 1, "--allow-urls"),
        (["caption", "PHOTOS", "--heatmap", "x.png"], 2, "--heatmap"),
        (["paint"], 2, "paint"),
        (["evaluate", "captions", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    ],
)
def test_mistakes_get_one_clear_line(
    told: Callable[..., Done],
    model: Path,
    photos: Path,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    filled = [{"PHOTO": str(photos / "a.png"), "PHOTOS": str(photos)}.get(a, a) for a in arguments]
    if "caption" in filled and "--model" not in filled and len(filled) > 1:
        filled += ["--model", str(model)]
    done = told(*filled)
    assert done.code == code, done.err
    assert words in done.err and "Traceback" not in done.err
    assert done.out == ""


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = run("caption", "x.png", "--num-beans", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--num-beans" in done.stderr and "Traceback" not in done.stderr


def test_heatmap_is_a_picture(
    told: Callable[..., Done], model: Path, photos: Path, tmp_path: Path
) -> None:
    from PIL import Image

    done = told("caption", photos / "a.png", "-m", model, "--heatmap", tmp_path / "heat.png")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "heat.png") as image:
        assert image.width >= 50 and image.height >= 40


def test_heatmap_never_covers_the_photo(
    told: Callable[..., Done], model: Path, photos: Path
) -> None:
    before = (photos / "a.png").read_bytes()
    done = told("caption", photos / "a.png", "-m", model, "--heatmap", photos / "." / "a.png")
    assert done.code == 2 and "is a file that is read: give another name" in done.err
    assert (photos / "a.png").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("format", ["text", "json"])
def test_output_that_cannot_be_written_is_one_sentence(
    model: Path, photos: Path, format: str
) -> None:
    command = [sys.executable, "-m", "diptych", "caption", photos / "a.png", "-m", model]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "-f", format], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "diptych: standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_terminated_export_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diptych", "export", "default", tmp_path / "made"]
    process = subprocess.Popen(
        [*command, "--task", "image-to-text"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".made.*.partial")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_what_was_printed(model: Path, photos: Path, tmp_path: Path) -> None:
    for index in range(3000):
        (tmp_path / f"{index:04}.png").write_bytes((photos / "a.png").read_bytes())
    command = [sys.executable, "-m", "diptych", "caption", tmp_path, "-m", model, "-f", "json"]
    with (tmp_path / "out.json").open("wb") as output:
        process = subprocess.Popen(
            # Beams and length make the work slow enough to be interrupted on any machine.
            [*command, "--num-beams", "5", "--max-length", "60", "--min-length", "60"],
            stdout=output,
            stderr=subprocess.PIPE,
        )
    deadline = time.monotonic() + 60
    while (tmp_path / "out.json").stat().st_size < 2000 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in complaint and b"Traceback" not in complaint
    assert 0 < len(json.loads((tmp_path / "out.json").read_text())) < 3000


def test_a_reader_that_leaves_is_no_error(model: Path, photos: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m diptych caption {photos} -m {model} | head -n 1",
        shell=True,
        capture_output=True,
    )
    assert done.returncode == 0 and done.stderr == b""


def test_version_and_models(told: Callable[..., Done]) -> None:
    assert run("--version").stdout == f"diptych {diptych.__version__}\n"
    listed = told("models")
    assert listed.code == 0 and "default" in listed.out
    assert "nlpconnect/vit-gpt2-image-captioning" in listed.out
    records = json.loads(told("models", "--format", "json").out)
    assert {"name", "licence", "source"} <= records[0].keys()


def test_evaluate_captions(
    told: Callable[..., Done], model: Path, photos: Path, tmp_path: Path
) -> None:
    rows = [
        {"file": "a.png", "captions": ["a dog runs", "a brown dog"], "split": "test"},
        {"file": "b.jpg", "captions": ["two birds", "birds in snow"], "split": "test"},
        {"file": "sub/c.webp", "captions": ["a bus"], "split": "val"},
    ]
    references = photos / "captions.jsonl"
    references.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = told("caption", photos, "-m", model, "-f", "jsonl")
    (tmp_path / "made.jsonl").write_text(made.out)
    by_model = told("evaluate", "captions", references, "-m", model, "-f", "json")
    by_file = told(
        "evaluate", "captions", references, "--captions", tmp_path / "made.jsonl", "-f", "json"
    )
    assert by_model.code == 0, by_model.err
    assert json.loads(by_model.out) == json.loads(by_file.out)
    perfect = "".join(
        json.dumps({"file": r["file"], "text": r["captions"][0]}) + "\n" for r in rows[:2]
    )
    (tmp_path / "perfect.jsonl").write_text(perfect)
    done = told(
        "evaluate", "captions", references, "--split", "test",
        "--captions", tmp_path / "perfect.jsonl", "-f", "json",
    )  # fmt: skip
    scores = json.loads(done.out)
    assert scores["num_images"] == 2 and scores["bleu_1"] == pytest.approx(1)
    assert scores["cider_d"] > scores["blind"]["cider_d"]


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_does_what_the_list_of_all_says(name: str) -> None:
    """Help of all verbs imports none: their first lines are written down a second time."""
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.help.splitlines()[0] == VERBS[name].summary


def test_help_imports_no_verb() -> None:
    script = (
        "import sys; sys.argv = ['diptych', '--help']; from diptych.cli import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert all(f"\n  {name} " in done.stdout for name in VERBS)
    ours = {name for name in done.stderr.split() if name.startswith("diptych.")}
    assert ours == {f"diptych.{name}" for name in ("cli", "cli.terminal", "cli.verbs", "errors")}


def test_help_is_fast() -> None:
    """Under 0.3 s is promised: measured as processor time, for the machine may be busy."""
    times = []
    for _ in range(5):
        before = os.times()
        assert run("--help").returncode == 0
        after = os.times()
        times.append(
            after.children_user - before.children_user
            + after.children_system - before.children_system
        )  # fmt: skip
    assert min(times) < 0.3, times
