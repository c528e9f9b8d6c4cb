"""Edits: maps of hidden states, one type per module."""

from guardlens.interventions.edits.affine import Affine
from guardlens.interventions.edits.base import Edit, require_edit
from guardlens.interventions.edits.custom import Custom
from guardlens.interventions.edits.placebo import Placebo
from guardlens.interventions.edits.relative_add import RelativeAdd
from guardlens.interventions.edits.swap import Swap

__all__ = ["Affine", "Custom", "Edit", "Placebo", "RelativeAdd", "Swap", "require_edit"]
