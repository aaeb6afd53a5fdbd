"""How every command ends: 0 done, 2 bad input, 130 interrupted, and one line on stderr that says what."""

import sys

import typer

from lib.errors import BadInput


def exit_code(app: typer.Typer, name: str, words: list[str] | None = None) -> int:
    """Run `python -m name` with `words`, by default the command line's; complaints about it and bad input are one line each."""
    try:
        app(words, prog_name=f"python -m {name}", standalone_mode=False)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not the command line's own complaint about an option
            raise
        print(f"error: {error.format_message()}; --help lists the options", file=sys.stderr)
        return 2
    return 0
