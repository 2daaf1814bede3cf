"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong, where, and what to do.

    The command lines print it without a traceback and exit with code 2.
    """
