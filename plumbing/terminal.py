"""What a person sees at the terminal: lines, progress bars, and errors that are one line.

What is printed often quotes a response, a file or a command line, so control characters are escaped first. A line that
cannot be written is dropped: a closed pipe never ends a run.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NoReturn, TextIO

from safetensors import SafetensorError
from tqdm import tqdm


class UserError(ValueError):
    """An error that the user can fix: one line that names the file, key or value and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).replace("\n", r"\n"))


class Interrupted(Exception):
    """Raised with the number of a signal (SIGINT, SIGTERM, SIGHUP) to stop a run."""


def printable(text: str) -> str:
    """`text` with everything but printable characters and newlines escaped: no terminal codes, no hidden marks."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def is_rank_zero() -> bool:
    """Whether this process writes and prints: of several (ranks.py) only the first does."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def progress_bar(what: str, unit: str, work: Any = None) -> tqdm:
    """A bar over `work` (or updated by hand) that disappears when it is done; none where there is no terminal."""
    options: Any = {"leave": False, "unit_scale": not work, "disable": None if is_rank_zero() else True}
    return tqdm(work, desc=what, unit=unit, **options)


def say(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    if file is None and not is_rank_zero():
        return
    with suppress(OSError, UnicodeError):
        tqdm.write(printable(text), end=end, file=file or sys.stdout)  # above a progress bar
        (file or sys.stdout).flush()


def warn(text: str, kind: str = "warning") -> None:
    """A line for stderr, whichever rank it is of."""
    say(f"{kind}: {text}", file=sys.stderr)


warn_once = lru_cache(warn)


@contextmanager
def training_continues(what: str) -> Iterator[None]:
    """Whatever fails in here is reported, and does not stop training."""
    try:
        yield
    except Exception as error:
        warn_once(f"{what}: {one_line(error)}; training continues")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, and its kind where its text alone may say little."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:500]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory: torch, cuBLAS, CUDA graphs and the CPU report it in words of their own."""
    return bool(re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error)))


def exit_status(program: str, work: Callable[[], object]) -> int:
    """Do the work of a program; an error that the user can fix becomes one line and status 2."""
    try:
        work()
        return 0
    except Interrupted as stop:
        return 128 + int(stop.args[0])
    except KeyboardInterrupt:
        warn("stopped immediately, without saving", program)
        return 130
    except (UserError, OSError, SafetensorError) as error:  # the last one: a full disk
        warn(one_line(error), program)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        warn("out of memory where nothing can be made smaller: try train.optimizer=offload", program)
    return 2


def run_program(main: Callable[[], int]) -> NoReturn:
    """`main` as a program that ends with the status it returns, even if its streams are closed or broken."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try once more at exit to write what could not be written, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
