"""The one exception that means "your input", as opposed to "our bug"."""


class CompressError(ValueError):
    """What was expected, what came, what to change; the command line prints it on one line and exits with 2."""
