"""What a user can get wrong, and what a machine can.

A `UserError` ends a command with exit status 2 and its message as one line on standard error: what was
found, where, what was expected, what to do. A `MachineError` (a full disk, a file that vanished while it was
read) ends it with exit status 1 and one line as well. So does a `NonFiniteError`.
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


def report_errors(work: Callable[[], int | None]) -> int:
    """Runs `work` and turns what the user or the machine got wrong into one line and an exit status."""
    try:
        return work() or 0
    except UserError as error:
        return _fail(error, 2)
    except (MachineError, NonFiniteError) as error:
        return _fail(error, 1)
    except BrokenPipeError:
        # The reader of our output has gone (`dynrec … | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        return _fail(error, 1)
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
