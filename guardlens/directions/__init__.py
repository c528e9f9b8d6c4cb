"""Directions that carry safety: one orthonormal basis per layer, from paired or labelled activations."""

from guardlens.directions.basis import Directions
from guardlens.directions.checks import warn_of_own_queries
from guardlens.directions.estimators import diff_in_means, from_vectors, random, ssd

__all__ = ["Directions", "diff_in_means", "from_vectors", "random", "ssd", "warn_of_own_queries"]
