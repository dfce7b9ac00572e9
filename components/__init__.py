"""One KFP component per stage: typed artifacts in and out around one call of the library."""

from components.stages import (
    evaluate,
    generate_responses,
    mine_feedback,
    prepare_data,
    promote_model,
    register_model,
    screen,
    screen_improved,
    train_guard,
)

__all__ = [
    "evaluate",
    "generate_responses",
    "mine_feedback",
    "prepare_data",
    "promote_model",
    "register_model",
    "screen",
    "screen_improved",
    "train_guard",
]
