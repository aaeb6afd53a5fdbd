"""The two exceptions a user is meant to read: each becomes one line on stderr, with exit code 2 or 1."""


class BadInput(ValueError):
    """Bad input from the user. The message is one line that names the file, the field and the fix."""


class Failed(Exception):
    """A computation that ended badly through no fault of the input. The message is one line."""
