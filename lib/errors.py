"""The one exception a user is meant to read: it becomes one line on stderr and exit code 2."""


class BadInput(ValueError):
    """Bad input from the user. The message is one line that names the file, the field and the fix."""
