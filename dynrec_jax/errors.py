"""What a user can get wrong, and what a machine can.

A `UserError` ends a command with exit status 2 and its message as one line on standard error: what was
found, where, what was expected, what to do. A `MachineError` (a full disk, a file that vanished while it was
read) ends it with exit status 1 and one line as well. So does a `NonFiniteError`. A run that was told to stop, and
did, ends with `AGAIN`: started again with the same command, it goes on.
"""

import errno
import os
import sys
from collections.abc import Callable

# What the operating system refuses for reasons that are not ours: no space, no permission, no more open files.
MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE),
}

AGAIN = os.EX_TEMPFAIL  # 75: nothing is wrong, and the same command goes on


class UserError(Exception):
    """A user's mistake; the message is one line, fit to be shown as it is."""


class ConfigError(UserError):
    """A config key or value, or a flag, that is unknown, mistyped or contradicts another."""


class HeldRunError(ConfigError):
    """Another process trains in the run folder."""


class DataError(UserError):
    """Input data, a dataset folder or a run folder that is missing, damaged or not what it must be."""


class MachineError(Exception):
    """A fault of the machine; the message is one line, fit to be shown as it is."""


class NonFiniteError(ArithmeticError):
    """A number that must be finite is NaN or infinite; the message is one line and says where."""


class Preempted(Exception):
    """The run was told to stop (SIGTERM), and all that it had done is on the disk; the message is one line."""

    before_a_step = "stopped by SIGTERM before a step was done; the same command starts again, or goes on"


def status_of(error: BaseException) -> int | None:
    """The exit status of a command that ends with this error and one line; None where it is our own fault."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, Preempted):
        return AGAIN
    known = isinstance(error, MachineError | NonFiniteError)
    return 1 if known or (isinstance(error, OSError) and error.errno in MACHINE) else None


def report_errors(work: Callable[[], int | None]) -> int:
    """Runs `work` and turns what the user or the machine got wrong into one line and an exit status."""
    try:
        return work() or 0
    except BrokenPipeError:
        # The reader of our output has gone (`dynrec … | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        return _fail(error, status)
    except KeyboardInterrupt:
        print(
            "dynrec: interrupted; the same command starts again, or goes on from the last checkpoint or part",
            file=sys.stderr,
        )
        return 130


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _fail(error: BaseException, status: int) -> int:
    # What comes from files, such as names of columns, must not command the terminal.
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in one_line(error))
    print(f"dynrec: {text}", file=sys.stderr)
    return status
