"""The error types whose messages are written for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: one sentence that names the file or field, what was found and what was expected. The CLI exits with 2."""


class RunEnded(Exception):
    """A run that had to end early with nothing wrong in its input: start it again. The CLI exits with `code`.

    STOPPED after SIGTERM (128 + its number, as shells count), TRY_AGAIN when another process is gone (EX_TEMPFAIL of sysexits.h).
    """

    STOPPED, TRY_AGAIN = 143, 75

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence for the person and the exit code; None for what is a mistake of the program."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, RunEnded):
        return str(error), error.code
    if isinstance(error, OSError):  # a full disk, a missing permission: the person can mend it
        return f"{error.filename or 'file system'}: {error.strerror or error}; nothing saved before is lost.", 2
    return None
