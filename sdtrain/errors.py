"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right.

    The message is a sentence: what is wrong, where (file, row, key, setting), what to do.
    Command line and flows print it alone, without a traceback.
    """
