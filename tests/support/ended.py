"""How a call of the command line ended."""

from dataclasses import dataclass


@dataclass
class Ended:
    """Its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err

    @property
    def words(self) -> str:
        """What was printed, with the line breaks of tables undone."""
        return " ".join(self.all.split())
