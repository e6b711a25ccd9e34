"""The error that a command prints as one line."""


class UserError(ValueError):
    """Input that its user can mend; the message is one line with the file or key, the value and the fix.

    `cli.run` prints it without a traceback and exits with status 2. A ValueError of a library keeps its
    traceback.
    """
