"""One KFP component per stage: typed artifacts in and out around one call of the library."""

from components.stages import (
    evaluate,
    generate_responses,
    mine_feedback,
    prepare_data,
    promote_model,
    record_mining,
    register_model,
    score_benchmarks,
    screen,
    screen_candidate,
    train_guard,
)

__all__ = [
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
]
