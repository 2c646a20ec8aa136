"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do.

    The scripts print it as one line and leave with exit status 2, without a traceback.
    """
