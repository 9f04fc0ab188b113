"""Run the command line: `python -m diptych` is `diptych`."""

from diptych.cli import main

main()
