"""The names of the files that stages write into their folders."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLES, HELD_OUT = "examples.parquet", "held_out.parquet"
MINING, MINING_PAGE = "mining.json", "mining.html"
BLOCKED_INPUTS = "blocked_inputs.jsonl"
EVALUATION, REPORT, SUMMARY, SCORE_TABLE = "evaluation.json", "report.html", "summary.md", "scores.parquet"
Sections = Mapping[str, Any]


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy one file of a stage's folder to where an artifact is expected."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
