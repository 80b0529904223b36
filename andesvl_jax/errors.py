"""The one error type whose message is written for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: one sentence that names the file or field, what was found and what was expected. The CLI exits with 2."""
