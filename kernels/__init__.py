"""Operations on keys and values, as plain functions of tensors; they know no model and no store."""

from ragkv.kernels.reference import Rotation, deviation, place, rotation_tables

__all__ = ["Rotation", "deviation", "place", "rotation_tables"]
