"""Public verbs called with plausible wrong values: python -m tests.fuzz [EXAMPLES] prints, as JSON, what came out that should not.

A call may give a result, an error of ours, or Python's own TypeError about the signature. Flags are left alone: they take whatever Python
takes for true or false. It runs in a process of its own, as users' code
does: the tests' type checks would meet wrong types before guardlens does.
"""

import datetime
import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hypothesis import HealthCheck, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from PIL import Image

import guardlens as gl
from guardlens import defences, directions, gates, judges, presentations, scores
from guardlens import interventions as iv

SECONDS = 20
"""After which a call counts as hanging."""

SIGNATURE = ("missing", "unexpected keyword", "positional argument", "multiple values")
"""What Python's own TypeErrors about a call say."""


FUNCTIONS = {"names_filter", "fn"}
"""Arguments whose functions are called; what others' functions raise is theirs."""


class Mute:
    """Can't be shown."""

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "10**400": lambda: 10**400,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "True": lambda: True,
    "''": lambda: "",
    "'x'": lambda: "x",
    "a lone surrogate": lambda: "\ud83d",
    "b''": lambda: b"",
    "[]": list,
    "{}": dict,
    "set()": set,
    "()": tuple,
    "[None]": lambda: [None],
    "['x']": lambda: ["x"],
    "[-1]": lambda: [-1],
    "[[1, 2]]": lambda: [[1, 2]],
    "(1, 2, 3)": lambda: (1, 2, 3),
    "{'x': 1}": lambda: {"x": 1},
    "...": lambda: ...,
    "slice(2)": lambda: slice(2),
    "range(2)": lambda: range(2),
    "a generator": lambda: (each for each in "ab"),
    "np.float64(2)": lambda: np.float64(2),
    "np.int64(99)": lambda: np.int64(99),
    "np.bool(0)": lambda: np.bool_(False),
    "np.array([])": lambda: np.array([]),
    "np.zeros((2, 3))": lambda: np.zeros((2, 3)),
    "np.array(['a'])": lambda: np.array(["a"]),
    "np.array([None])": lambda: np.array([None]),
    "torch.zeros(())": lambda: torch.zeros(()),
    "torch.zeros(0)": lambda: torch.zeros(0),
    "torch.zeros(3, 4)": lambda: torch.zeros(3, 4),
    "torch.zeros(2, 2, 2, 2)": lambda: torch.zeros(2, 2, 2, 2),
    "torch.ones(128, dtype=int)": lambda: torch.ones(128, dtype=torch.int64),
    "torch.nan": lambda: torch.full((8, 128), float("nan")),
    "a date": lambda: datetime.date(2025, 2, 14),
    "a DataFrame": lambda: pd.DataFrame({"text": ["a", "b"]}),
    "a Series": lambda: pd.Series([1.0, 2.0]),
    "pd.NA": lambda: pd.NA,
    "a class": lambda: gl.Query,
    "a lambda": lambda: lambda *given, **named: None,
    "a path": lambda: Path("nowhere"),
    "an image": lambda: Image.new("L", (2, 3)),
    "an object": object,
    "Mute()": Mute,
    "[Mute()]": lambda: [Mute()],
    "a Query": lambda: gl.Query("how to mend the hat ?"),
    "a Site": lambda: gl.Site("z"),
    "a presentation": lambda: presentations.blank("grey", 8),
    "a defence": lambda: defences.none,
    "a judge": lambda: judges.keyword,
    "an intervention": lambda: iv.nothing,
    "a free intervention": lambda: iv.add(directions.from_vectors(torch.ones(7))),
    "directions": lambda: directions.from_vectors(torch.ones(7)),
    "a state": lambda: iv.State(hook="resid_post", layer=2),
    "a table": lambda: gl.Table({"x": np.arange(2)}),
}


def verbs() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each verb with arguments that it takes."""
    model = gl.load("organism")
    WRONG["the model"] = lambda: model
    WRONG["a module"] = lambda: model.hf
    every = gl.organism.queries("validation")
    queries, grey = (*every[:6], *every[-6:]), presentations.blank("grey", 32)
    pairs = gl.QueryPairs(gl.organism.pairs().harmful[:6], gl.organism.pairs().harmless[:6])
    batch = model.batch(queries[:2], grey)
    text = gl.collect(model.llm, pairs)
    asked, shown = (gl.collect(each, pairs, how) for each, how in ((model.llm, presentations.text_only), (model, grey)))
    ssd, intervention = directions.ssd(text), iv.add(directions.ssd(text))
    placed, kept = intervention.at(layers=[3]), model.prefill(batch)
    _, cache = model.run_with_cache(batch)
    effect = gl.sweep(model, intervention, queries, grey, layers=[3, 5])
    parts = gl.attribute(model, ssd, queries, grey, layer=3)
    gap = gl.compare(asked, shown, ssd, draws=20)
    arms = {"none": defences.none, "guard": placed}
    answered = gl.evaluate(model, arms, queries, [presentations.text_only, grey], judge=gl.organism.judge, max_new_tokens=1)
    patched = gl.activation_patching(model, queries, grey, layers=[3])
    saved = Path("saved")
    saved.mkdir()
    ssd.save(saved / "ssd.safetensors"), text.save(saved / "text.safetensors"), placed.save(saved / "intervention.safetensors")
    cache.save(saved / "cache.safetensors"), effect.save(saved / "effect")
    ask = {"model": model, "queries": queries[:2], "presentation": grey}

    def through(make: Callable[..., Any]) -> Callable[..., Any]:
        """An intervention or presentation, made and then used."""

        def used(**given: Any) -> Any:
            made = make(**given)
            if isinstance(made, iv.Intervention):
                return repr(made), made.fingerprint, model.run(batch, made.placed([3]))
            if isinstance(made, iv.gates.Gate):
                return repr(made), model.run(batch, placed.when(made))
            return model.batch(queries[0], made)

        return used

    def judged(query: Any, answer: Any, **given: Any) -> Any:
        return judges.Keyword(**given)(query, answer)

    return {
        "Query": (gl.Query, {"text": "a", "label": "harmful", "id": "i", "images": (), "pair": "p", "cluster": "c", "source": "s"}),
        "QueryPairs": (gl.QueryPairs, {"harmful": pairs.harmful, "harmless": pairs.harmless}),
        "QueryPairs.from_queries": (gl.QueryPairs.from_queries, {"queries": pairs.queries}),
        "read_queries": (gl.read_queries, {"path": "x.jsonl"}),
        "Site": (gl.Site, {"hook": "resid_post", "layers": (1,), "positions": "last"}),
        "own images": (
            lambda images: model.batch(gl.Query("a", images=images), presentations.own_images),
            {"images": (Image.new("L", (8, 8)),)},
        ),
        "blank": (through(presentations.blank), {"colour": "grey", "size": 8}),
        "Blank": (through(presentations.Blank), {"colour": "grey", "size": 8}),
        "noise": (through(presentations.noise), {"seed": 1, "size": 8}),
        "framed": (through(presentations.framed), {"inner": grey, "before": "a ", "after": " b", "label": "c"}),
        "chat": (through(presentations.chat), {"inner": grey, "system": "a ", "prefill": " b", "label": "c"}),
        "a presentation": (grey, {"query": queries[0]}),
        "text_only": (presentations.text_only, {"query": queries[0]}),
        "own": (presentations.own_images, {"query": queries[-1]}),
        "batch": (model.batch, {"queries": queries[:2], "presentation": grey, "padding_side": "left"}),
        "run": (
            model.run,
            {"batch": batch, "interventions": [placed], "read": [gl.Site()], "logits": "last", "new_tokens": 0, "seed": 1, "generation": {}}
            | {"layout": "auto"},
        ),
        "run, new tokens": (model.run, {"batch": kept, "interventions": placed, "new_tokens": 1, "seed": 1, "generation": {}}),
        "prefill": (model.prefill, {"batch": batch}),
        "answering": (
            lambda tokens: model.run(kept.answering(tokens), logits="answer"),
            {"tokens": torch.ones(2, 3, dtype=torch.int64)},
        ),
        "share": (model.share, {"batch": batch}),
        "run_with_cache": (model.run_with_cache, {"queries": queries[:2], "presentation": grey, "names_filter": "resid_post"}),
        "run_with_hooks": (model.run_with_hooks, {"queries": queries[:2], "presentation": grey, "fwd_hooks": []}),
        "hook function": (
            lambda names_filter, fn: model.run_with_hooks(batch, fwd_hooks=[(names_filter, fn)]),
            {"names_filter": "resid_post", "fn": lambda v, hook: v},
        ),
        "generate": (
            model.generate,
            {"queries": queries[:2], "presentation": grey, "intervention": placed, "max_new_tokens": 1, "seed": 1},
        ),
        "decode": (model.decode, {"tokens": torch.ones(2, 3, dtype=torch.int64)}),
        "to_logits": (model.to_logits, {"states": torch.zeros(2, 128)}),
        "cache": (cache.__getitem__, {"key": "blocks.3.hook_resid_post"}),
        "cache.stack": (cache.stack, {"hook": "z"}),
        "accumulated_resid": (cache.accumulated_resid, {"layer": 3}),
        "decompose_resid": (cache.decompose_resid, {"layer": 3}),
        "logit_lens": (cache.logit_lens, {"pos_slice": -1}),
        "ssd": (directions.ssd, {"activations": text, "rank": 1}),
        "diff_in_means": (directions.diff_in_means, {"activations": text}),
        "random": (directions.random, {"like": ssd, "seed": 1}),
        "from_vectors": (
            directions.from_vectors,
            {"vectors": torch.ones(8, 128), "model": "", "layers": range(8), "hook": "z", "method": "m"},
        ),
        "Directions.at": (ssd.at, {"layer": 3}),
        "Directions[]": (ssd.__getitem__, {"layer": 3}),
        "truncate": (ssd.truncate, {"rank": 1}),
        "coordinates": (ssd.coordinates, {"activations": text}),
        "cosine": (ssd.cosine, {"other": ssd}),
        "Activations": (
            gl.Activations,
            {"states": text.states, "layers": text.layers, "queries": text.queries, "hook": "resid_post", "positions": "last"},
        ),
        "Activations.at": (text.at, {"layer": 3}),
        "select": (text.select, {"which": [0, 1]}),
        "project_out": (through(iv.project_out), {"directions": ssd}),
        "amplify": (through(iv.amplify), {"directions": ssd, "alpha": 1.0}),
        "replace": (through(iv.replace), {"directions": ssd, "reference": iv.text_twin, "gain": 1.0}),
        "patch": (through(iv.patch), {"directions": ssd, "reference": ssd.harmless_mean}),
        "add_component": (through(iv.add_component), {"directions": ssd, "reference": 0.0, "gain": 1.0}),
        "add": (through(iv.add), {"directions": ssd, "alpha": 1.0}),
        "add_relative": (through(iv.add_relative), {"directions": ssd, "alpha": 1.0}),
        "linear": (through(iv.linear), {"matrix": torch.eye(128), "alpha": 1.0}),
        "swap": (through(iv.swap), {"reference": iv.text_twin, "part": (0, 4)}),
        "custom": (through(iv.custom), {"fn": lambda states, context: states, "requires": (iv.text_twin,)}),
        "State": (
            lambda **given: model.run(batch, iv.swap(iv.State(**given)).at(layers=[3])),
            {"run": grey, "hook": "resid_post", "layer": 2, "positions": "last"},
        ),
        "at": (intervention.at, {"hook": "resid_pre", "layers": [1], "positions": "last"}),
        "when": (intervention.when, {"gate": gates.harmful(ssd)}),
        "during": (intervention.during, {"phase": "decode"}),
        "scaled": (through(intervention.scaled), {"strength": 2.0}),
        "placebo": (through(intervention.placebo), {"seed": 1}),
        "placed": (intervention.placed, {"layers": [1], "strength": 1.0}),
        ">>": (intervention.__rshift__, {"after": intervention}),
        "gates.harmful": (through(gates.harmful), {"directions": ssd, "threshold": 0.0, "state": iv.own_state}),
        "gates &": (gates.harmful(ssd).__and__, {"other": gates.harmful(ssd)}),
        "threshold_at_fpr": (gates.threshold_at_fpr, {"directions": ssd, "activations": text, "rate": 0.1}),
        "Defence": (defences.Defence, {"name": "x", "intervention": intervention, "present": lambda inner: inner}),
        "reminder": (defences.reminder, {"before": "a ", "after": " b"}),
        "vlm_guard": (
            lambda **given: model.run(batch, defences.vlm_guard(**given).intervention.placed([3])),
            {"directions": ssd, "layers": 3, "reading": "replace", "alpha": 1.0, "gate": "midpoint"}
            | {"reference": iv.text_twin, "positions": "last", "phase": "prefill"},
        ),
        "collect": (
            gl.collect,
            ask | {"intervention": placed, "site": gl.Site(), "out": None, "dtype": "float32", "batch_size": 2},
        ),
        "keep": (gl.keep, ask | {"batch_size": 2}),
        "compare": (gl.compare, {"llm": asked, "vlm": shown, "directions": ssd, "draws": 5}),
        "sweep": (
            gl.sweep,
            ask | {"interventions": intervention, "scores": [scores.kl], "strengths": [1.0], "layers": [3], "placebos": 0},
        ),
        "sweep.best": (effect.best, {"k": 1, "intervention": "edit"}),
        "sweep.plot": (effect.plot, {"score": "kl"}),
        "evaluate": (
            gl.evaluate,
            {"model": model, "defences": {"none": defences.none}, "queries": (queries[0], queries[-1]), "presentations": grey}
            | {"judge": gl.organism.judge, "out": None, "max_new_tokens": 1, "batch_size": 2},
        ),
        "rate": (lambda rate, defence, shown: answered.rate(rate, defence, shown), {"rate": "asr", "defence": "none", "shown": "text"}),
        "gap_closed": (lambda defence, shown: answered.gap_closed(defence, shown), {"defence": "guard", "shown": "blank grey"}),
        "mcnemar": (
            lambda first, second, shown, rate: answered.mcnemar(first, second, shown, rate=rate),
            {"first": "none", "second": "guard", "shown": "text", "rate": "asr"},
        ),
        "attribute": (
            gl.attribute,
            {"model": model, "directions": ssd, "queries": (queries[0], queries[-1]), "presentations": grey, "layer": 2}
            | {"batch_size": 2},
        ),
        "top": (parts.top, {"k": 1, "presentation": "blank grey", "label": "harmful", "direction": 1}),
        "attribution.plot": (parts.plot, {"label": "harmful", "direction": 1, "token_source": None}),
        "activation_patching": (
            gl.activation_patching,
            ask | {"donor": presentations.text_only, "hooks": "resid_post", "layers": [3], "scores": [scores.kl]},
        ),
        "patching.plot": (patched.plot, {"value": "change"}),
        "comparison.plot": (gap.plot, {"metrics": ["auroc"]}),
        "attach": (
            lambda **given: gl.attach(**given).remove(),
            {"intervention": placed, "hf": model.hf, "processor": model.processor, "twin": None},
        ),
        "Keyword": (judged, {"query": queries[0], "answer": "sorry", "phrases": ("sorry",), "reach": 4, "shortest": 1, "name": "x"}),
        "RefusalLogOdds": (lambda starts: scores.RefusalLogOdds(starts).token_ids(model.tokenizer), {"starts": ("sorry",)}),
        "AnswerLogProb": (lambda text: scores.AnswerLogProb(text).answer(model, kept), {"text": "sorry"}),
        "AnswerKL": (lambda tokens: scores.AnswerKL(tokens).answer(model, kept), {"tokens": 1}),
        "Table": (gl.Table, {"columns": {"x": np.arange(2)}, "facts": {}}),
        "Table.from_rows": (gl.Table.from_rows, {"rows": [{"x": 1}]}),
        "Table.where": (lambda **given: effect.where(**given), {"layer": 3, "intervention": "edit"}),
        "load": (
            gl.load,
            {
                "source": "organism",
                "processor": None,
                "llm": None,
                "eyes": None,
                "dtype": "float32",
                "device": None,
                "revision": None,
                "names": {},
            },
        ),
        "Directions.load": (gl.Directions.load, {"path": saved / "ssd.safetensors"}),
        "Activations.load": (gl.Activations.load, {"path": saved / "text.safetensors"}),
        "Intervention.load": (gl.Intervention.load, {"path": saved / "intervention.safetensors"}),
        "ActivationCache.load": (gl.ActivationCache.load, {"path": saved / "cache.safetensors"}),
        "Table.load": (gl.Table.load, {"path": saved / "effect"}),
        "Directions.save": (ssd.save, {"path": saved / "again.safetensors"}),
        "Table.save": (effect.save, {"path": saved / "again"}),
    }


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Empty where a call does what it may, else what came out of it."""
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**arguments)
    except gl.errors.GuardlensError:
        return ""
    except Exception as error:
        if type(error) is TypeError and any(part in str(error) for part in SIGNATURE):
            return ""
        return f"{type(error).__name__}: {_said(error)} at {_place(error)}"
    finally:
        signal.alarm(0)
    return ""


def _said(error: Exception) -> str:
    try:
        return str(error).split("\n")[0][:160]
    except Exception:
        return "an error that can't be shown"


def _place(error: BaseException) -> str:
    """The last line of guardlens that it went through."""
    place, frame = "nowhere", error.__traceback__
    while frame is not None:
        path = Path(frame.tb_frame.f_code.co_filename)
        if path.parts[-2:-1] == ("guardlens",) or "guardlens" in path.parts[-3:-1]:
            place = f"{path.name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def changed(arguments: dict[str, Any], changes: dict[str, str]) -> dict[str, Any]:
    """The arguments, some of them wrong."""
    return arguments | {name: WRONG[value]() for name, value in changes.items()}


def sampled(call: Callable[..., Any], arguments: dict[str, Any], examples: int) -> dict[str, str]:
    """The simplest changes, of one argument or two, that bring out what should not come; found by hypothesis."""
    single = st.sampled_from([(name, value) for name in sorted(arguments) for value in WRONG if tried(name, value)])
    changes = st.lists(single, min_size=1, max_size=2).map(dict)
    quiet = settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    try:
        found = find(changes, lambda wrong: bool(outcome(call, changed(arguments, wrong))), settings=quiet)
    except NoSuchExample:
        return {}
    return {shown(found): outcome(call, changed(arguments, found))}


def whole(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, str]:
    """Every single change that brings out what should not come."""
    single = ({name: value} for name in sorted(arguments) for value in WRONG if tried(name, value))
    found = {shown(wrong): outcome(call, changed(arguments, wrong)) for wrong in single}
    return {wrong: came for wrong, came in found.items() if came}


def tried(name: str, value: str) -> bool:
    """Whether a wrong value is one for an argument."""
    return not (name in FUNCTIONS and callable(WRONG[value]()))


def shown(changes: dict[str, str]) -> str:
    """As in a call."""
    return ", ".join(f"{name}={value}" for name, value in sorted(changes.items()))


def _late(*_: Any) -> None:
    raise TimeoutError(f"no end within {SECONDS} seconds")


def main(examples: int, names: list[str]) -> dict[str, dict[str, str]]:
    """By verb: the calls, and what came out of them. All single changes of `examples` is 0."""
    import matplotlib as mpl

    mpl.use("Agg")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    with tempfile.TemporaryDirectory() as room, chdir(room):
        known = verbs()
        for name, (call, arguments) in known.items():
            assert (came := outcome(call, arguments)) == "", f"{name} as it should be: {came}"
        return {
            name: sampled(call, arguments, examples) if examples else whole(call, arguments)
            for name, (call, arguments) in known.items()
            if not names or name in names
        }


if __name__ == "__main__":
    print(json.dumps({name: came for name, came in main(int((sys.argv[1:] or ["0"])[0]), sys.argv[2:]).items() if came}, indent=1))
