"""The exception whose message is meant for users."""

from sdtrain.redaction import without_secrets


class UserError(Exception):
    """A problem that the user can fix: what is wrong, where (file, row, key, setting), what to do.

    The command line and flows print the message alone, without a traceback or the secrets of its URLs.
    """

    def __init__(self, *sentence: object) -> None:
        super().__init__(*(without_secrets(part) if isinstance(part, str) else part for part in sentence))
