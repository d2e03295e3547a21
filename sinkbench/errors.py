"""The one exception that people see, and what becomes one."""

import re


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    The command line prints the message and exits with status 2; ``--debug`` shows the traceback.
    """


def out_of_memory(error: BaseException) -> UserError | None:
    """What to say of an error by which the system refused memory to this process; ``None`` of any other."""
    if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
        return None
    wanted = re.search(r"allocate (\d+) bytes", str(error))
    size = f": {int(wanted[1]) / 2**30:,.1f} GiB were asked for at once" if wanted else ""
    found = UserError(f"there is not enough memory{size}; give a smaller window, chunk or model")
    found.__cause__ = error
    return found
