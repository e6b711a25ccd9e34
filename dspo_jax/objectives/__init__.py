"""Objectives: from predictions to a loss per example, found by name.

`get_objective("dspo", lam=0.05)(Predictions(...), schedule)` gives `(loss [B], metrics {name: [B]})`. To add
one, write a frozen dataclass that derives from `Objective`, and name it in `registry.OBJECTIVES`.
"""

from dspo_jax.objectives.objective import LossAndMetrics, Objective, Predictions
from dspo_jax.objectives.registry import OBJECTIVES, get_objective

__all__ = ["OBJECTIVES", "LossAndMetrics", "Objective", "Predictions", "get_objective"]
