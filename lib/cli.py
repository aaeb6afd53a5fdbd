"""How every command ends: 0 done, 2 bad input or a file that cannot be used, 130 interrupted, 1 anything else.

Whatever it was, stderr says it in one line; with `EMPATHY_TRACEBACK=1` the traceback stands above that line.
"""

import os
import signal
import sys
import traceback
from typing import NoReturn

import typer

from lib.errors import BadInput, Failed

LONGEST = 1000  # characters of a message: it may quote what a user gave, which may be a book


def exit_code(app: typer.Typer, name: str, words: list[str] | None = None) -> int:
    """Run `python -m name` with `words`, by default the command line's; returns its exit code."""
    command = typer.main.get_command(app)
    try:  # not `app()`, which adds an empty line to Ctrl-C and has a code of its own for some errors
        with command.make_context(f"python -m {name}", list(sys.argv[1:] if words is None else words)) as context:
            command.invoke(context)
        sys.stdout.flush()  # a full disk behind stdout shows here at the latest
    except typer.Exit as done:
        return done.exit_code
    except (Exception, KeyboardInterrupt) as error:
        code, message = ending(error)
        if os.environ.get("EMPATHY_TRACEBACK") == "1":
            traceback.print_exc()
        print(one_line(message), file=sys.stderr)
        drop_stdout()
        return code
    return 0


def leave(code: int) -> NoReturn:
    """End the process. What was to be done is done and said: Ctrl-C while the interpreter tidies up changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def ending(error: BaseException) -> tuple[int, str]:
    """`(exit code, message)` of whatever ended a command."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted; run the same command to go on"
    if isinstance(error, BadInput):
        return 2, f"error: {error}"
    if isinstance(error, Failed):
        return 1, f"error: {error}"
    if isinstance(error, BrokenPipeError):
        return 2, "error: stdout was closed before everything was printed"
    if isinstance(error, OSError):
        name = f"{os.fspath(error.filename)!s}: " if error.filename is not None else ""
        return 2, f"error: {name}{error.strerror or str(error) or type(error).__name__}; free space, or see whether the path and its permissions are right"
    if isinstance(error, MemoryError):
        return 1, "error: not enough memory; close other programs, or take a smaller study or --quick"
    if hasattr(error, "format_message"):  # the command line's own complaint about an option
        return 2, f"error: {error.format_message()}; --help lists the options"
    return 1, f"error: unforeseen {type(error).__name__}: {str(error) or 'no message'} (EMPATHY_TRACEBACK=1 shows the traceback)"


def one_line(message: str) -> str:
    """A message without line breaks and control characters, which a quoted name may hold, and of bounded length."""
    text = "".join(letter if letter.isprintable() else " " if letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in message)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST // 2]} … {text[-LONGEST // 2:]}"
    return text


def drop_stdout() -> None:
    """What stdout could not take is dropped, so that the interpreter's end does not complain a second time."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
