"""The one exception that means: the user can fix this. The launch scripts print it as one line and exit with status 2."""


class UserError(ValueError):
    """A mistake in the input: its message names the key or file, what was found, what was expected, and the fix."""
