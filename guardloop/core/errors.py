"""Errors that are shown to people: what is wrong, where, and what to do about it."""

from guardloop.core.text import clean


class GuardLoopError(Exception):
    """A problem that the user can mend. The command line prints it without a traceback and exits with code 2.

    `what` says what is wrong and where; `remedy` says what to do. Both are kept without secrets and control characters.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = clean(what), clean(remedy)
        super().__init__(f"{self.what}\n  -> {self.remedy}" if remedy else self.what)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
