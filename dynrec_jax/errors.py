"""What a user can get wrong, and what a machine can.

A `UserError` ends a command with exit status 2 and its message as one line on standard error: what was
found, where, what was expected, what to do. A `MachineError` (a full disk, a file that vanished while it was
read) ends it with exit status 1 and one line as well.
"""


class UserError(Exception):
    """A user's mistake; the message is one line, fit to be shown as it is."""


class ConfigError(UserError):
    """A config key or value, or a flag, that is unknown, mistyped or contradicts another."""


class DataError(UserError):
    """Input data, a dataset folder or a run folder that is missing, damaged or not what it must be."""


class MachineError(Exception):
    """A fault of the machine; the message is one line, fit to be shown as it is."""
