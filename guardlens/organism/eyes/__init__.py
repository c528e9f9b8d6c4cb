"""Eyes for a language model that people use: `python -m guardlens.organism.eyes --llm ID_OR_PATH --out DIR`.

An aligned language model stays frozen while a small vision encoder and its projector learn, from harmless drawings alone, to answer through
it. What happens to its refusals beside an image, nobody has taught.

`drawings.py` has what eyes are shown, `recipe.py` the settings, `train.py` the training, `exam.py` the exam, `make.py` the command.
`guardlens.models.eyes` puts eyes before a language model; `gl.load(llm, eyes=DIR)` loads both.
"""

from guardlens.organism.eyes.recipe import QUICK, RECIPE, Recipe, Stage

__all__ = ["QUICK", "RECIPE", "Recipe", "Stage"]
