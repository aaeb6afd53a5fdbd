"""Does empathy in a language model split into perspective-taking and warmth, and how much room does it have?"""

import os
import sys

# jsonschema, which every notebook's kernel meets through nbformat, would build this package's grammar for more than a
# second to check addresses in schemas that hold none; without it jsonschema leaves that check out.
sys.modules.setdefault("rfc3987_syntax", None)


def end(kind, error, trace) -> None:
    """Ctrl-C while a command's imports are still running, before `lib.cli` can say so: the same line, the same code."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; run the same command to go on", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # Python is looking for the command's module within this package
    sys.excepthook = end
