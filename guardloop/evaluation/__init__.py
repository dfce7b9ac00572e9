"""Compare the improved guard with the default guard on scores alone, and decide on promotion."""

from guardloop.evaluation.compare import evaluate
from guardloop.evaluation.paired import GuardRun
from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings

__all__ = ["Evaluation", "EvaluationSettings", "GateSettings", "GuardRun", "evaluate"]
