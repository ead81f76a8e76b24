"""The exceptions that mean "the input is wrong" or "try again", as against "the code is wrong"."""

import errno

# Exit statuses of a command that was asked to stop and saved, and of one that lost another process.
SAVED, LOST = 75, 76


class UserError(ValueError):
    """Bad input, reported in one line that names the thing and the expected value.

    The entry points in launch/ print the message alone and exit with status 1. Every other
    exception is a defect of this project and keeps its traceback.
    """


class SharedError(UserError):
    """An error that all processes of a run raise together, so that they can end in order."""


class LostPeerError(UserError):
    """Another process of the run was lost or hangs: start all of them again."""


def describe(error: BaseException) -> str:
    """An error as a line; an operating system error as "file: what"."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {reason_of(error)}"
    return str(error)


def reason_of(error: OSError) -> str:
    """What the system says of a file, and of a limit of this process how it is raised."""
    if error.errno == errno.EMFILE:
        return f"{error.strerror}, expected a higher limit (ulimit -n)"
    return error.strerror or str(error)
