"""The documentation against the program: every block of Python runs, every command line parses.

Nothing here needs weights or a network: "default" stands for tiny models. A page's Python blocks
run in order and share their names. `<!-- no-run: reason -->` before a block has it compiled only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from diptych import Captioner, export
from diptych.weights import catalog
from tiny_models import make_captioner
from tiny_pipelines import make_pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
# The plan of the whole house: its code shows patterns, of rooms that are yet to be built, too.
PLANS = {ROOT / "docs" / "concepts" / "architecture.md"}
LANGUAGES = {"python", "console", "sh", "text", "json", ""}

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
NO_RUN = re.compile(r"<!-- no-run: \S.*? -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    source = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(source):
        before = source[: found.start()]
        line = before.count("\n") + 2
        language = (found["info"].split() or [""])[0]
        runs = not NO_RUN.search(before) and page not in PLANS
        text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        yield Block(page, line, language, text, runs)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def tiny_default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model in the form of the embedded one: checkpoint and artifact in a folder."""
    folder = tmp_path_factory.mktemp("default") / "captioner"
    make_captioner(folder, 3)
    artifact = tmp_path_factory.mktemp("artifact") / "captioner"
    Captioner.load(folder).export(artifact)
    shutil.copytree(artifact, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny generator in the form of the embedded one."""
    folder = tmp_path_factory.mktemp("default") / "generator"
    make_pipeline(folder, "sd1", 3, scheduler="sd2", sample_size=4)
    artifact = tmp_path_factory.mktemp("artifact") / "generator"
    export(folder, artifact)
    shutil.copytree(artifact, folder, dirs_exist_ok=True)
    return folder


# --- Python ---------------------------------------------------------------------------------------


PYTHON_PAGES = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.mark.no_cover  # these pages are no tests of what they show
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(
    page: Path,
    tiny_default: Path,
    tiny_generator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(ROOT / "examples" / "photos", tmp_path / "examples" / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "EMBEDDED", tiny_default)
    monkeypatch.setattr(catalog, "EMBEDDED_GENERATOR", tiny_generator)
    names: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        # Blank lines put the line numbers of a traceback where the page has them.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        if block.runs:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_name_a_language_we_know(page: Path) -> None:
    unknown = [
        f"{b.language} in line {b.line}" for b in blocks(page) if b.language not in LANGUAGES
    ]
    assert not unknown
    # An even number of fences: an open one would hide the rest of the page from the tests.
    fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(page)))


# --- command lines --------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield every simple command of a page with its line: pipes and lists are taken apart."""
    for block in blocks(page):
        if block.language not in ("console", "sh"):
            continue
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            if block.language == "console":
                if not line.startswith("$ "):
                    continue  # what the command prints
                line = line[2:]
            yield from ((block.line, command) for command in split(line))


def printed_commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the commands whose output docs/generate_outputs.py fills in."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"<!-- prints: (.+?) -->", text):
        if found[1] != "python":
            yield text.count("\n", 0, found.start()) + 1, shlex.split(found[1])


def split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    words = iter(lexer)
    for word in words:
        if set(word) <= set("|&;()"):
            yield command
            command = []
        elif set(word) <= set("<>"):
            next(words)  # the file of a redirection
        elif command or not re.fullmatch(r"\w+=.*", word):
            command.append(word)
    if command:
        yield command


COMMANDS = [
    pytest.param(command, id=f"{name_of(page)}:{line} {' '.join(command)}"[:90])
    for page in PAGES
    if page not in PLANS
    for line, command in [*commands(page), *printed_commands(page)]
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_parse(command: list[str]) -> None:
    match command:
        case ["diptych", *arguments] | ["python", "-m", "diptych", *arguments]:
            parse(arguments)
        case ["make", *targets]:
            rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {t for t in targets if "=" not in t} <= set(rules)
        case ["pip", "install", *packages]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for package in packages:
                for extra in re.findall(r"\[(.*)\]", package):
                    assert extra in extras["optional-dependencies"]
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case [program, *_]:
            assert program in {"cat", "cd", "curl", "git", "head", "torchrun"}, (
                f"what is {program}?"
            )


def parse(arguments: list[str]) -> None:
    """Send arguments through the real app up to, and not into, the verb; then check the options."""
    from typer.main import get_command

    from diptych.cli import app
    from diptych.cli.flags import meant
    from diptych.image_to_text.options import CaptionOptions
    from diptych.text_to_image.options import (
        GenerateOptions,
        ImageToImageOptions,
        InpaintOptions,
    )
    from diptych.text_to_image.style_options import StyleOptions
    from diptych.training.options import CaptionerTrainOptions, GeneratorTrainOptions

    kinds: dict[str, Any] = {"generate": GenerateOptions, "images": GenerateOptions}
    kinds |= {"img2img": ImageToImageOptions, "inpaint": InpaintOptions}
    kinds |= {"stylize": StyleOptions, "style": StyleOptions}
    kinds |= {"generator": GeneratorTrainOptions, "captioner": CaptionerTrainOptions}
    command, name = get_command(app), "diptych"
    if arguments in (["--help"], ["--version"]):
        return
    while hasattr(command, "commands"):
        context = command.make_context(name, list(arguments))
        rest = [*context._protected_args, *context.args]
        assert rest, f"{name}: which verb?"
        assert rest[0] in command.commands, f"{name} has no verb {rest[0]}"
        command, name, arguments = command.commands[rest[0]], rest[0], rest[1:]
    values = command.make_context(name, list(arguments)).params
    options = kinds.get(name, CaptionOptions)()
    names = {field.name for field in dataclasses.fields(options)}
    asked = {n: meant(v) for n, v in values.items() if n in names and v not in (None, [])}
    options.replace(**asked)


@pytest.mark.parametrize(
    "line",
    [
        "diptych caption a.jpg --num-beans 4",
        "diptych caption a.jpg --num-beams four",
        "diptych caption a.jpg --num-beams 4 --top-p 0.5",
        "diptych caption",
        "diptych generate tulip --steps 0",
        "diptych generate tulip --sampler eulr",
        "diptych paint a.jpg",
        "diptych img2img a.jpg --strength 2",
        "diptych inpaint a.jpg --extend up=3",
        "diptych stylize a.jpg",
        "cat a.jpg | diptych caption - --heat-map x.png",
        "make coffee",
        "pip install 'diptych[telepathy]'",
    ],
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT012
        for command in split(line):
            test_command_lines_parse(command)


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page not in PLANS], ids=name_of)
def test_flags_and_options_in_the_text_exist(page: Path) -> None:
    """Look at inline code: `--flag` must be one of ours, and `word=value` an argument or option."""
    from typer.main import get_command

    from diptych.cli import app

    def flags(command: Any) -> Iterator[str]:
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        for child in getattr(command, "commands", {}).values():
            yield from flags(child)

    known = {*flags(get_command(app)), "--help", "--check"}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = {flag for code in re.findall(r"`([^`\n]+)`", text) for flag in FLAG.findall(code)}
    assert named <= known, sorted(named - known)


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def anchors(page: Path) -> set[str]:
    """Return the anchors that mkdocs gives the headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", word) for word in words}


def test_the_reference_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))
    assert script["main"](["--check"]) == 0, capsys.readouterr().out


def test_outputs_are_filled_in() -> None:
    empty = [name_of(page) for page in PAGES if "(not run yet" in page.read_text(encoding="utf-8")]
    assert not empty, "run python docs/generate_outputs.py"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = {line.rpartition(": ")[2].strip() for line in navigation.splitlines()}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("**/*.md")}
    assert pages <= listed, sorted(pages - listed)


def test_benchmarks_page_is_what_the_records_give() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "render.py"), run_name="render")
    page = ROOT / "docs" / "benchmarks.md"
    assert page.read_text("utf-8") == script["render"](), "run python benchmarks/render.py"


def test_the_plan_names_every_file() -> None:
    (plan,) = PLANS
    named = set(re.findall(r"[\w*]+\.py", plan.read_text(encoding="utf-8")))
    package = ROOT / "src" / "diptych"
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    told_by_room = {Path("cli"), Path("weights/dialects")}  # a file each, of one kind
    left_out = {
        str(path)
        for path in files
        if path.parent not in told_by_room
        and path.name != "__init__.py"
        and not any(fnmatch(path.name, name) for name in named)
    }
    assert not left_out
