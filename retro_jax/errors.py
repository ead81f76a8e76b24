"""The one exception that means "the input is wrong", as against "the code is wrong"."""


class UserError(ValueError):
    """Bad input, told in one line that names the thing and what was expected.

    The entry points in launch/ print the message alone and exit with status 1. Every other
    exception is a defect of this project and keeps its traceback.
    """
