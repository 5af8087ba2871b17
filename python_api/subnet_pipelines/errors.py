"""The one exception that the command line prints as a sentence instead of a traceback."""


class Refusal(ValueError):
    """What was asked cannot be done; the message is one sentence that says what was expected, what came, and where."""


class NotLearnt(Exception):
    """Raised by a method's `predict` for a task it has not learnt yet; the entry of the matrix is then null."""
