"""Write the generated pages."""

import sys
from pathlib import Path

from scripts.docs.configuration import configuration_page
from scripts.docs.contracts import contracts_page

ROOT = Path(__file__).absolute().parents[2]


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Every generated file of the repository, and what it should hold."""
    return {
        root / "docs/configuration.md": configuration_page(),
        root / "docs/contracts.md": contracts_page(),
    }


def main() -> None:
    """Write what changed, and name it."""
    for path, text in generated().items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            sys.stdout.write(f"  {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
