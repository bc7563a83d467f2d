"""The one exception that a user is meant to read."""

from sdtrain.redaction import without_secrets


class UserError(Exception):
    """Something the user can put right.

    The message is a sentence: what is wrong, where (file, row, key, setting), what to do.
    Command line and flows print it alone, without a traceback. No secret that a URL in it holds is shown.
    """

    def __init__(self, *sentence: object) -> None:
        super().__init__(*(without_secrets(part) if isinstance(part, str) else part for part in sentence))
