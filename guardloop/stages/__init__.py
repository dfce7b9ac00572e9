"""The pipeline's stages: files in, files out. Each is what one component calls, and no more than a stage's story.

An image has the packages of its own stage only, so that a stage imports what it works with when it is called.
"""

from guardloop.stages.benchmarks import benchmark_guards, score_benchmarks
from guardloop.stages.data import prepare_data
from guardloop.stages.evaluation import curves_of, evaluate
from guardloop.stages.files import (
    BLOCKED_INPUTS,
    EVALUATION,
    EXAMPLES,
    HELD_OUT,
    MINING,
    MINING_PAGE,
    REPORT,
    SCORE_TABLE,
    SUMMARY,
    Sections,
    copy_file,
)
from guardloop.stages.guard import screen, screen_candidate
from guardloop.stages.mining import mine_feedback, write_training_set
from guardloop.stages.registry import promote_model, record_mining, register_model
from guardloop.stages.responses import generate_responses
from guardloop.stages.training import train_guard

__all__ = [
    "BLOCKED_INPUTS",
    "EVALUATION",
    "EXAMPLES",
    "HELD_OUT",
    "MINING",
    "MINING_PAGE",
    "REPORT",
    "SCORE_TABLE",
    "SUMMARY",
    "Sections",
    "benchmark_guards",
    "copy_file",
    "curves_of",
    "evaluate",
    "generate_responses",
    "mine_feedback",
    "prepare_data",
    "promote_model",
    "record_mining",
    "register_model",
    "score_benchmarks",
    "screen",
    "screen_candidate",
    "train_guard",
    "write_training_set",
]
