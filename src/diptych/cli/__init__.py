"""Open the door for the command line: `diptych <verb>`; flags are built from the options.

stdout carries the result, stderr progress and complaints. Exit codes: 0 ok, 1 failed, 2 usage,
3 some inputs failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
import threading
from typing import Annotated

import typer

from diptych.cli.terminal import FAILED, INTERRUPTED, USAGE, Notes, begin_notes, complain
from diptych.cli.verbs import Verbs, without_frills
from diptych.errors import BadImage, BadInput, DiptychError

__all__ = ["app", "main"]

_TERMINATED = 128 + signal.SIGTERM

app = without_frills(
    cls=Verbs,
    name="diptych",
    help="Pictures into words and words into pictures, on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line and leave with its exit code."""
    notes = Notes(logging.WARNING)
    logging.getLogger("diptych").addHandler(notes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name or caption that the terminal cannot show is shown escaped, not fatal.
            stream.reconfigure(errors="backslashreplace")
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        # As an interruption: what is half written is taken away, then the process ends.
        former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:
            complain("interrupted")
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader left (`| head`): say nothing, and keep Python from flushing into the void.
        sys.stdout = None
        sys.exit(0)
    except DiptychError as error:
        complain(str(error))
        usage = isinstance(error, BadInput) and not isinstance(error, BadImage)
        sys.exit(USAGE if usage else FAILED)
    except OSError as error:
        # Files have their own sentences, most of them: without a name it is the terminal, or what
        # stands for it.
        sys.stdout = None
        what = "standard output cannot be written" if error.filename is None else error.filename
        complain(f"{what}: {error.strerror or error}")
        sys.exit(FAILED)
    except Exception as error:
        # Click's own complaints: an unknown flag, a missing argument.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(USAGE)
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, former)
        logging.getLogger("diptych").removeHandler(notes)


def _version(value: bool) -> None:
    if value:
        from diptych import __version__

        print(f"diptych {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    begin_notes()
