"""When to edit: a yes or no for each query, decided once from held states in the prefill and kept for the decode steps."""

from guardlens.interventions.gates.base import AllOf, AnyOf, Gate, Not
from guardlens.interventions.gates.linear import Linear
from guardlens.interventions.gates.safety import harmful, threshold_at_fpr

__all__ = ["AllOf", "AnyOf", "Gate", "Linear", "Not", "harmful", "threshold_at_fpr"]
