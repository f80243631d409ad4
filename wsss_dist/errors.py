"""Errors the launch scripts print as one line: UserError (exit status 2) and TrainingError (its `exit_code`)."""


class UserError(ValueError):
    """A mistake in the input: its message names the key or file, what was found, what was expected, and the fix."""

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that cannot go on, through no mistake in the input; the launch scripts print it as one line."""

    exit_code = 1


class CheckpointError(TrainingError):
    """A checkpoint could not be written (disk full, quota, no permission); the previous one is intact."""

    exit_code = 74
