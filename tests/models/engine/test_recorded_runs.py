"""Runs of every strategy give what they gave when they were recorded. `python -m tests.models.engine.test_recorded_runs` records them anew.

The numbers are compared up to rounding on every machine, and to the bit on one like that on which they were recorded.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import guardlens as gl
from guardlens import gates, presentations
from guardlens import interventions as iv
from guardlens.directions import Directions
from tests.conftest import wide_llava

RECORDS = Path(__file__).with_suffix(".json")
TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
LATE, MANY = gl.Site(layers=(5, 7)), gl.Site(layers=(7,), positions="all")


def two_directions(model):
    generator = torch.Generator().manual_seed(5)
    vectors = torch.linalg.qr(torch.randn(8, 128, 2, generator=generator)).Q.transpose(1, 2).contiguous()
    means = torch.randn(2, 8, 128, generator=generator)
    return Directions(vectors, tuple(range(8)), means[0], means[1], torch.zeros(8, 0), "test", provenance=model.provenance)


def lanes(model):
    """No edit, a late one, an early one, two in a row, a gated one, and one that needs the text twin's state."""
    basis = two_directions(model)
    single = basis.truncate(1)
    push = iv.add(single, 4.0).at(layers=[6])
    gated = push.when(gates.Linear("mine", None, single.vectors[4], torch.zeros(1)))
    return [iv.nothing, push, iv.project_out(basis).at(layers=[1, 2]), iv.amplify(basis).at(layers=[3]) >> push, gated,
            iv.replace(basis, iv.text_twin).at(layers=[7])]  # fmt: skip


def everywhere(interventions):
    return [intervention.at(positions="all").during("always") for intervention in interventions[1:4]]


def recorded(model):
    """A name for each run -> the run. They come in a fixed order, as what is kept of one must not change the next."""
    batch, interventions = model.batch(TEXTS, GREY), lanes(model)
    texts = model.batch(TEXTS)
    words = batch.inputs["input_ids"][:1, -3:].expand(len(TEXTS), 3)
    kept = model.prefill(batch)
    said = kept.answering(words)
    shared = model.share(model.batch(TEXTS * 8, GREY))
    assert shared is not None
    return {
        "plain": model.run(batch, interventions[1], read=[LATE]),
        "plain, all tokens": model.run(batch, interventions[3], logits="all", read=[MANY]),
        "behind a prefix": model.run(batch.after(shared), interventions[1], read=[LATE]),
        "tiles": model.run(batch, interventions, read=[LATE], layout="tile"),
        "tiles of text": model.run(texts, interventions, layout="tile"),
        "branches": model.run(batch, interventions, read=[LATE]),
        "branches of kept prompts": model.run(kept, interventions),
        "branches of longer ends": model.run(batch, [intervention.at(positions=(-3, None)) for intervention in interventions[:4]]),
        "branches of answers": model.run(said, [intervention.during("always") for intervention in interventions], logits="answer"),
        "tiles of answers": model.run(said, interventions, logits="answer", layout="tile"),
        "forks": model.run(batch, everywhere(interventions), read=[LATE], layout="fork"),
        "forks of text": model.run(texts, everywhere(interventions), layout="fork"),
        "generated": model.run(batch, interventions, new_tokens=6),
        "generated behind kept prompts": model.run(kept, interventions, new_tokens=6),
        "drawn": model.run(batch, interventions[:2], new_tokens=6, seed=3, generation={"do_sample": True}),
    }


def tensors(run):
    """All that a run gave, by name."""
    reads = {f"reads {site.hook} {site.positions}": value for site, value in run.reads.items()}
    decisions = {f"gate {' '.join(map(str, key))}": opened for key, opened in run.decisions.items()}
    found = {"logits": run.logits, "tokens": run.tokens, **reads, **decisions}
    return {name: value for name, value in found.items() if value is not None}


def machine():
    """What rounding depends on."""
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread"


def digest(value):
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]


def summary(value):
    """A few numbers of each lane: what it adds up to along a fixed random direction, and its length."""
    flat = value.double().flatten(1) if value.ndim > 1 else value.double()[None]
    weights = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [[round(float(row @ weights), 5), round(float(row.norm()), 5)] for row in flat]


def described(run):
    entries = {
        name: {"shape": list(value.shape), "numbers": summary(value), "digest": digest(value)} for name, value in tensors(run).items()
    }
    return {"layout": run.layout, "why": run.why, "values": entries}


@pytest.fixture(scope="module")
def outcomes(processor):
    return {name: described(run) for name, run in recorded(gl.load(wide_llava(), processor=processor)).items()}


KNOWN = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {"machine": "", "runs": {}}


def test_every_run_is_recorded(outcomes):
    assert list(outcomes) == list(KNOWN["runs"])


@pytest.mark.parametrize("name", KNOWN["runs"])
def test_a_run_gives_what_it_gave(name, outcomes):
    mine, known = outcomes[name], KNOWN["runs"][name]
    assert (mine["layout"], mine["why"]) == (known["layout"], known["why"])
    assert mine["values"].keys() == known["values"].keys()
    for part, value in known["values"].items():
        assert mine["values"][part]["shape"] == value["shape"]
        torch.testing.assert_close(torch.tensor(mine["values"][part]["numbers"]), torch.tensor(value["numbers"]), rtol=1e-4, atol=1e-3)
        if KNOWN["machine"] == machine():
            assert mine["values"][part]["digest"] == value["digest"], part


if __name__ == "__main__":
    from guardlens.organism.train import build_processor

    torch.set_num_threads(1)
    model = gl.load(wide_llava(), processor=build_processor())
    runs = {name: described(run) for name, run in recorded(model).items()}
    RECORDS.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
