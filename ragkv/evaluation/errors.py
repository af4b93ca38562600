"""What an evaluation raises on purpose."""

from ragkv.errors import RagKVError


class EvaluationError(RagKVError, ValueError):
    """An evaluation cannot be run as asked: data of no known form, an arm or a metric that does not exist, other settings."""


class GateError(EvaluationError):
    """The model is not driven exactly, so that no score would mean anything."""
