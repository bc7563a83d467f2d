"""The exception whose message is meant for users, and the sentences for what the machine refuses."""

import errno
from pathlib import Path

from sdtrain.redaction import without_secrets

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}


class UserError(Exception):
    """A problem that the user can fix: what is wrong, where (file, row, key, setting), what to do.

    The command line and flows print the message alone, without a traceback or the secrets of its URLs.
    """

    def __init__(self, *sentence: object) -> None:
        super().__init__(*(without_secrets(part) if isinstance(part, str) else part for part in sentence))


def user_error_of(error: BaseException) -> UserError | None:
    """The error itself if it is meant for users, or what it should have said to them; None for a fault of ours.

    Of the latter kind are a file that may not be opened, a full or read-only disk, a user without a home folder.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
        path, home = Path(str(error.filename)), _home()
        if home is not None and path.is_relative_to(home):
            return UserError(
                f"{path} cannot be used: {error.strerror}. It lies in your home, {home}; set HOME to a folder that can "
                "be written, or SDTRAIN_CACHE, HF_HOME and XDG_CACHE_HOME to where caches may go."
            )
        return UserError(f"{path} cannot be used: {error.strerror}. Check its permissions and the room on its disk.")
    if (isinstance(error, RuntimeError) and "home directory" in str(error)) or (
        isinstance(error, KeyError) and "getpwuid" in str(error)
    ):
        return UserError("This user has no home folder. Set HOME to a folder that can be written.")
    return None


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None
