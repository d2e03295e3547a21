"""The one exception that people see."""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    The command line prints the message and exits with status 2; ``--debug`` shows the traceback.
    """
