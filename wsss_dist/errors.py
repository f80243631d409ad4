"""Errors the launch scripts print as one line: UserError (exit status 2) and TrainingError (its `exit_code`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

E = TypeVar("E", bound=Exception)


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


class Interrupted(TrainingError):
    """A signal ended the work in the middle; the same command goes on from there."""

    exit_code = 75


def collective(error: E) -> E:
    """The error, marked as one that every rank raises: rank 0 alone says it, any other is said where it is met."""
    error.is_collective = True
    return error


def is_collective(error: Exception) -> bool:
    """Does every rank raise it?"""
    return getattr(error, "is_collective", False)


@contextmanager
def raised_alike(*kinds: type[Exception]) -> Iterator[None]:
    """Every rank makes the same call inside, and an error of it is raised by all of them.

    Args:
        kinds: of errors of which that is so; none: UserError and TrainingError.
    """
    kinds = kinds or (UserError, TrainingError)
    try:
        yield
    except kinds as error:
        collective(error)
        raise
