"""Figures: each function takes a tidy data frame and returns matplotlib axes in the style of `plots.style`.

The functions know no type of guardlens, so they draw any frame with the right columns. In a script call `save`, which also closes the
figure; notebooks show and close figures by themselves.
"""

from guardlens.results.plots.defences import arms
from guardlens.results.plots.directions import basis, coordinates, cosines, spectrum
from guardlens.results.plots.layers import TITLES as TITLES
from guardlens.results.plots.layers import effect_maps, layer_curves
from guardlens.results.plots.saving import save

__all__ = ["arms", "basis", "coordinates", "cosines", "effect_maps", "layer_curves", "save", "spectrum"]
