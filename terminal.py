"""Lines for the person at the terminal; one that cannot be written is dropped, so a closed pipe never ends a run.

What is printed often quotes a response, a file or a command line, so control characters are escaped first.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO

from tqdm import tqdm


def printable(text: str) -> str:
    """`text` with everything but printable characters and newlines escaped: no terminal codes, no hidden marks."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def talks() -> bool:
    """Of several processes (ranks.py) the first."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(what: str, unit: str, total: int | None = None, done: int = 0) -> tqdm:
    """A bar that is gone when its work is; none where there is no terminal."""
    hidden = None if talks() else True
    return tqdm(desc=what, unit=unit, total=total, initial=done, unit_scale=total is None, leave=False, disable=hidden)


def say(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    if file is None and not talks():
        return
    with suppress(OSError, UnicodeError):
        tqdm.write(printable(text), end=end, file=file or sys.stdout)  # above a progress bar
        (file or sys.stdout).flush()


def complain(text: str) -> None:
    say(text, file=sys.stderr)


def warn(text: str) -> None:
    complain(f"warning: {text}")


def open_closed() -> None:
    """At the program's start: a stream that was closed (`2>&-`) becomes one that takes everything."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115


def drop_unwritten() -> None:
    """Before the program ends: else Python would try once more to write what could not be, and fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_program(main: Callable[[], int]) -> NoReturn:
    """`main` as a program whose streams may be closed or broken; it ends with the status that `main` returns."""
    open_closed()
    status = main()
    drop_unwritten()
    sys.exit(status)
