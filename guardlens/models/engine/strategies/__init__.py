"""The strategies: the ways to run many lanes at once. A new one is a file here, a name in this table, and a place in the scheduler's rule.

strategy        suits                                  costs
Tiles           everything                             a forward pass for each lane
Branches        edits and reads of the prompts' ends   the ends, for each lane
LateBranches    the same, of many layers               the ends once, and their layers from there on for each lane
Forks           edits and reads from a layer on        one forward pass, and the layers from there on for each lane
Answers         generation, edits of the last token    the new tokens
"""

from guardlens.models.engine.strategies.answers import Answers
from guardlens.models.engine.strategies.branches import Branches
from guardlens.models.engine.strategies.forks import Forks
from guardlens.models.engine.strategies.late_branches import LateBranches
from guardlens.models.engine.strategies.strategy import Disagreement, Strategy
from guardlens.models.engine.strategies.tiles import Tiles

__all__ = ["ANSWERS", "BRANCHES", "FORKS", "LATE_BRANCHES", "TILES", "Disagreement", "Strategy"]

TILES = Tiles()
BRANCHES = Branches()
LATE_BRANCHES = LateBranches()
FORKS = Forks()
ANSWERS = Answers()
