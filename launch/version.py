"""Which code this is: the commit that is checked out, and what was changed since."""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]


@dataclass(frozen=True)
class Code:
    """The commit of a checkout ("" where there is none), and a short hash of what differs from it ("" for nothing)."""

    commit: str = ""
    changes: str = ""

    @property
    def tag(self) -> str:
        """A name for this code and no other: it tags images, and is recorded with every run."""
        return f"{self.commit}-dirty-{self.changes}" if self.changes else self.commit


def code_state(root: Path = ROOT) -> Code:
    """The state of the checkout at `root`; a folder inside someone else's repository is none."""
    if _git(root, "rev-parse", "--show-toplevel").strip() != str(root.resolve()):
        return Code()
    commit = _git(root, "rev-parse", "HEAD").strip()
    if not commit or not _git(root, "status", "--porcelain", "--untracked-files=all"):
        return Code(commit)
    digest = hashlib.sha256(_git(root, "diff", "HEAD").encode())
    for path in _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
        if path:
            digest.update(f"{path} {_git(root, 'hash-object', '--', path)}".encode())
    return Code(commit, digest.hexdigest()[:8])


def _git(root: Path, *arguments: str) -> str:
    try:
        ended = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ended.stdout if ended.returncode == 0 else ""
