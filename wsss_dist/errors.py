"""Errors the launch scripts print as one line: UserError (exit status 2) and TrainingError (its `exit_code`)."""


class UserError(ValueError):
    """A mistake in the input: its message names the key or file, what was found, what was expected, and the fix."""

    exit_code = 2


class BadFile(UserError):
    """A UserError about files of the input, which the command's summary of problems names.

    Args:
        path: the file.
        reason: what is wrong with it, without the fix.
        message: the whole sentence.
        rows: (path, reason) of each single mistake, where there are several; None: the one above.
    """

    def __init__(self, path: object, reason: str, message: str, rows: list[tuple[str, str]] | None = None) -> None:
        super().__init__(str(path), reason, message, rows)  # all of them, so that it can be sent between processes
        self.path, self.reason, self.message = str(path), reason, message
        self.rows = rows or [(str(path), reason)]

    def __str__(self) -> str:
        return self.message


class TrainingError(RuntimeError):
    """A run that cannot go on, through no mistake in the input; the launch scripts print it as one line."""

    exit_code = 1


class CheckpointError(TrainingError):
    """A checkpoint could not be written (disk full, quota, no permission); the previous one is intact."""

    exit_code = 74
