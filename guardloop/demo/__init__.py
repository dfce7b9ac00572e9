"""What comes with GuardLoop: the sample data, and the adapter of the embedded guard."""

from pathlib import Path

SAMPLE = Path(__file__).parent / "sample"
