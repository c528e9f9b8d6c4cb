"""guardlens: where in a vision-language model does safety alignment get lost, and what edit brings it back?

Load a model and show it queries:   `load`, `HookedModel`, `Query`, `QueryPairs`, `read_queries`, `presentations`
Look at its hidden states:          `collect`, `Activations`, `ActivationCache`, `Site`, `directions`, `Directions`, `compare`
Ask which parts write them:         `attribute`, `activation_patching`
Change them:                        `interventions`, `gates`, `Intervention`
Guard a model outside of guardlens: `attach`
Measure what that does:             `scores`, `keep`, `sweep`, `judges`, `defences`, `evaluate`, `Table`
Try it all on a tiny model:         `organism`

Everything is loaded on first use, so importing guardlens costs next to nothing beyond torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardlens import defences, directions, errors, interventions, judges, organism, plots, presentations, scores
    from guardlens.activations import ActivationCache, Activations
    from guardlens.attachment import attach
    from guardlens.attribution import attribute
    from guardlens.collection import collect
    from guardlens.comparison import compare
    from guardlens.directions import Directions
    from guardlens.evaluation import evaluate
    from guardlens.interventions import gates
    from guardlens.interventions.plan import Intervention
    from guardlens.keeping import keep
    from guardlens.loading import load
    from guardlens.model import HookedModel
    from guardlens.patching import activation_patching
    from guardlens.queries import Query, QueryPairs, read_queries
    from guardlens.sites import Site
    from guardlens.sweeps import sweep
    from guardlens.tables import Table

__version__ = "0.1.0"

_MODULES = ("defences", "directions", "errors", "interventions", "judges", "organism", "plots", "presentations", "scores")
_NAMES = {
    "ActivationCache": "activations",
    "Activations": "activations",
    "Directions": "directions",
    "HookedModel": "model",
    "Intervention": "interventions.plan",
    "Query": "queries",
    "QueryPairs": "queries",
    "Site": "sites",
    "Table": "tables",
    "activation_patching": "patching",
    "attach": "attachment",
    "attribute": "attribution",
    "collect": "collection",
    "compare": "comparison",
    "evaluate": "evaluation",
    "gates": "interventions",
    "keep": "keeping",
    "load": "loading",
    "read_queries": "queries",
    "sweep": "sweeps",
}

__all__ = [
    "ActivationCache",
    "Activations",
    "Directions",
    "HookedModel",
    "Intervention",
    "Query",
    "QueryPairs",
    "Site",
    "Table",
    "activation_patching",
    "attach",
    "attribute",
    "collect",
    "compare",
    "defences",
    "directions",
    "errors",
    "evaluate",
    "gates",
    "interventions",
    "judges",
    "keep",
    "load",
    "organism",
    "plots",
    "presentations",
    "read_queries",
    "scores",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    elif name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
