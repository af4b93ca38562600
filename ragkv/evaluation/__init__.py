"""Evaluation: which repair, at what cost, on whose data. ``ragkv eval`` on the command line.

Not imported by ``import ragkv``.
"""

from ragkv.evaluation.arms import Arm, parse_arms
from ragkv.evaluation.bench import Bench
from ragkv.evaluation.cases import Case
from ragkv.evaluation.errors import EvaluationError, GateError
from ragkv.evaluation.formats import read_cases
from ragkv.evaluation.neighbours import with_neighbours
from ragkv.evaluation.run import Plan, Result, evaluate

__all__ = [
    "Arm",
    "Bench",
    "Case",
    "EvaluationError",
    "GateError",
    "Plan",
    "Result",
    "evaluate",
    "parse_arms",
    "read_cases",
    "with_neighbours",
]
