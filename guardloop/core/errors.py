"""Errors that are shown to people: what is wrong, where, and what to do about it."""

import re


class GuardLoopError(Exception):
    """A problem that the user can mend. The command line prints it without a traceback and exits with code 2.

    `what` says what is wrong and where; `remedy` says what to do.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}\n  -> {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


def without_secrets(text: str) -> str:
    """`text` with the user names and passwords of its URLs left out, for messages and logs."""
    return re.sub(r"://[^/\s'\"]*@", "://", text)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
