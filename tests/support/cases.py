"""How many examples hypothesis makes up: all of them in `make test`, a quarter in `make check`, which sets QUICK."""

import os


def cases(count: int) -> int:
    return max(count // 4, 5) if os.environ.get("QUICK") else count
