"""The checkout: what runs, submits and plans is there, and not in the installed package."""

import sys
from pathlib import Path

from guardloop.core.errors import GuardLoopError


def use_checkout() -> Path:
    """Make pipeline.py, components and launch importable, and return their folder.

    It is the folder above this package, or else the current one. Raises GuardLoopError if neither is a checkout.
    """
    for folder in (Path(__file__).absolute().parents[2], Path.cwd()):
        if (folder / "pipeline.py").is_file() and (folder / "launch").is_dir():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return folder
    raise GuardLoopError(
        "this command needs GuardLoop's repository, and was started outside of it",
        "clone it and start there; check, serve, review, promote, rollback, ui, config and demo-report work anywhere",
    )
