"""guardlens: where in a vision-language model does safety alignment get lost, and what edit brings it back?

Load a model and show it queries:   `load`, `HookedModel`, `Query`, `QueryPairs`, `read_queries`, `presentations`
Look at its hidden states:          `collect`, `Activations`, `ActivationCache`, `Site`, `directions`, `Directions`, `compare`
Ask which parts write them:         `attribute`, `activation_patching`
Change them:                        `interventions`, `gates`, `Intervention`
Guard a model outside of guardlens: `attach`
Measure what that does:             `scores`, `keep`, `sweep`, `judges`, `defences`, `evaluate`, `Table`
Try it all on a tiny model:         `organism`, `progress_bars`

Everything is loaded on first use, so importing guardlens costs next to nothing beyond torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardlens import defences, directions, errors, interventions, organism
    from guardlens.data import presentations
    from guardlens.data.activations import Activations
    from guardlens.data.queries import Query, QueryPairs
    from guardlens.data.readers import read_queries
    from guardlens.directions import Directions
    from guardlens.evaluation import judges
    from guardlens.evaluation.runner import evaluate
    from guardlens.experiments import scores
    from guardlens.experiments.attribution import attribute
    from guardlens.experiments.collection import collect
    from guardlens.experiments.comparison import compare
    from guardlens.experiments.patching import activation_patching
    from guardlens.experiments.sweeps import sweep
    from guardlens.hooks import Site
    from guardlens.interventions import gates
    from guardlens.interventions.intervention import Intervention
    from guardlens.models.activation_cache import ActivationCache
    from guardlens.models.attachment import attach
    from guardlens.models.hooked_model import HookedModel
    from guardlens.models.loading import load
    from guardlens.models.prompt_cache import keep
    from guardlens.results import plots
    from guardlens.results.progress import progress_bars
    from guardlens.results.tables import Table

__version__ = "0.1.0"

_HOMES = {
    "ActivationCache": "models.activation_cache",
    "Activations": "data.activations",
    "Directions": "directions",
    "HookedModel": "models.hooked_model",
    "Intervention": "interventions.intervention",
    "Query": "data.queries",
    "QueryPairs": "data.queries",
    "Site": "hooks",
    "Table": "results.tables",
    "activation_patching": "experiments.patching",
    "attach": "models.attachment",
    "attribute": "experiments.attribution",
    "collect": "experiments.collection",
    "compare": "experiments.comparison",
    "defences": "defences",
    "directions": "directions",
    "errors": "errors",
    "evaluate": "evaluation.runner",
    "gates": "interventions.gates",
    "interventions": "interventions",
    "judges": "evaluation.judges",
    "keep": "models.prompt_cache",
    "load": "models.loading",
    "organism": "organism",
    "plots": "results.plots",
    "presentations": "data.presentations",
    "progress_bars": "results.progress",
    "read_queries": "data.readers",
    "scores": "experiments.scores",
    "sweep": "experiments.sweeps",
}
"""Where each public name lives. A name that is its home's last part is the module itself."""

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    module = import_module(f"{__name__}.{home}")
    is_module = home.split(".")[-1] == name
    value = module if is_module else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
