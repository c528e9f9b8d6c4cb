"""What the examples of each page must have come to, by numbers that were worked out in another way. Each check gets the page's names."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import guardlens as gl
from guardlens import interventions as iv
from guardlens import presentations

CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {}


def check(page: str) -> Callable[[Callable[[SimpleNamespace], None]], Callable[[SimpleNamespace], None]]:
    def register(function: Callable[[SimpleNamespace], None]) -> Callable[[SimpleNamespace], None]:
        CHECKS[page] = lambda space: function(SimpleNamespace(**space))
        return function

    return register


def near(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def hooked(page: SimpleNamespace, layers: list[int], edit: Callable[[Tensor], Tensor], only_last: bool = False) -> Tensor:
    """Logits at the last token of the page's batch, of the plain model with forward hooks on its blocks: what other libraries do."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = edit(value)
        new = torch.cat([value[:, :-1], new[:, -1:]], dim=1) if only_last else new
        return (new, *output[1:]) if isinstance(output, tuple) else new

    blocks = page.model.hf.model.language_model.layers
    handles = [blocks[layer].register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        logits = page.model.hf(**page.batch.inputs).logits[:, -1]
    for handle in handles:
        handle.remove()
    return logits


def last(page: SimpleNamespace, intervention: Any) -> Tensor:
    return page.model.run(page.batch, intervention).logits[0]


@check("how-to/data.md")
def data(page: SimpleNamespace) -> None:
    assert page.ssd.layers == tuple(range(8)) and page.pairs.harmless[1].label == "harmless"
    assert [harmful.text for harmful, _ in page.both] == ["how to break the hat ?", "how to forge the letter ?", "how to break the lamp ?"]
    parts = [{query.pair for query in part} for part in (page.fit, page.validation, page.test)]
    assert sorted(map(len, parts)) == [1, 1, 1] and set.union(*parts) == {"hat", "letter", "lamp"}
    assert len({query.cluster for query in page.twice}) == 1 < len({query.id for query in page.twice})


@check("how-to/prompts.md")
def prompts(page: SimpleNamespace) -> None:
    model = page.model
    assert list(page.beside) == ["blank grey", "blank #3060c0", "noise"]
    assert model.batch(page.query, presentations.own_images).image.any() and not model.batch(page.query).image.any()
    assert model.tokenizer.decode(model.batch("how ?", page.begun).inputs["input_ids"][0, -2:]) == "sure :"
    assert "please stay safe ." in model.tokenizer.decode(model.batch("how ?", page.framed).inputs["input_ids"][0])
    again = model.generate("how to mend the hat ?", page.grey, do_sample=True, temperature=3.0, seed=1)
    assert len(set(page.warm)) > 1 and page.warm[1] == again


@check("how-to/hooks.md")
def hooks(page: SimpleNamespace) -> None:
    model, site = page.model, gl.Site(layers=(5,))
    assert len(page.cache) == 9 and page.states.shape[0] == 1 and page.states.shape[2] == model.cfg.d_model
    assert not torch.allclose(page.logits, model.run_with_cache("how to mend the hat ?", page.grey)[0])
    assert torch.equal(page.again.states, page.activations.states) and page.again.layers == (3, 4)
    plain, moved = model.run(model.batch("how ?"), [iv.nothing, iv.add(page.mine, 4.0).at(layers=[5])], read=[site]).reads[site][:, 0, 0]
    near(moved - plain, page.mine.vectors[0, 0] * 4)
    shown = model.batch("how to mend the hat ?", page.grey)
    text = gl.collect(model, "how to mend the hat ?", site=site).states[0, 0]
    plain, moved = model.run(shown, [iv.nothing, page.halfway], read=[site]).reads[site][:, 0, 0]
    near(moved, (plain + text) / 2)


@check("how-to/other-llm.md")
def other_llm(page: SimpleNamespace) -> None:
    assert page.model.llm is page.aligned is not page.model and isinstance(page.answer, str)


@check("how-to/results.md")
def results(page: SimpleNamespace) -> None:
    assert {"layers", "strength", "value"} <= set(page.rows.columns) and len(page.rates) == 4 and page.rates["asr"].between(0, 1).all()
    assert {"change", "low", "high"} <= set(page.means.columns) and Path("effect.csv").exists()
    answers = page.table.frame
    assert (answers["verdict"] == "refused").tolist() == answers["answer"].str.startswith("sorry").tolist()


@check("how-to/resume.md")
def resume(page: SimpleNamespace) -> None:
    """A run that is cut off in the middle of a record ends in the same table, and asks for the missing answers alone."""
    records = Path("runs/first/records.jsonl")
    whole = records.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert page.again.frame.equals(page.table.frame) and len(lines) == len(page.table)
    records.write_bytes(b"".join(lines[:-5]) + lines[-5][:20])
    asked = []

    judged = type(page.options["judge"]).__call__

    def counted(judge: Any, query: Any, answer: str) -> str:
        asked.append(query.id)
        return judged(judge, query, answer)

    shown = [presentations.text_only, page.grey]
    with mock.patch.object(type(page.options["judge"]), "__call__", counted):
        assert gl.evaluate(page.model, page.arms, page.queries, shown, **page.options).frame.equals(page.table.frame)
    assert len(asked) == 5 and json.loads(Path("runs/first/manifest.json").read_text())["configuration"]["max_new_tokens"] == 12
    fresh = gl.collect(page.model, gl.organism.pairs()).states
    near(page.fit.states, fresh)
    assert torch.equal(page.fit.states, gl.Activations.load("runs/fit").states)


@check("how-to/several-gpus.md")
def several_gpus(page: SimpleNamespace) -> None:
    away = [next(block.parameters()).is_meta for block in page.spread.hf.model.language_model.layers]
    assert away == [False] * 4 + [True] * 4
    assert page.answers[0] == page.answers[1] and page.spread.id == page.whole.id
    shown = [presentations.text_only, page.grey]
    options = {"judge": gl.organism.judge, "max_new_tokens": 12}
    together = gl.evaluate(page.whole, page.arms, page.queries, shown, **options)
    assert page.rates.drop(columns="gap_closed", errors="ignore").equals(together.summary().drop(columns="gap_closed", errors="ignore"))


@check("how-to/family.md")
def family(page: SimpleNamespace) -> None:
    assert page.broken == [] and len(page.results) > 8
    assert page.model.cfg.norm == "core.roof" and page.COSMOS.name == "Cosmos 3 Edge"


@check("how-to/defence.md")
def defence(page: SimpleNamespace) -> None:
    text = page.careful.present(page.grey)(page.queries[0]).text
    assert text == f"{gl.organism.REMINDER} {page.queries[0].text}" and page.both.intervention is page.push
    assert set(page.rates["defence"]) == set(page.conditions) and set(page.table.frame["draw"]) == {0, 1}


@check("how-to/export.md")
def export(page: SimpleNamespace) -> None:
    query, white = gl.Query("how to craft the marble ?"), presentations.blank("white", 32)
    start = page.inputs["input_ids"].shape[1]
    assert torch.equal(page.inputs["input_ids"], page.lab.batch(query, white).inputs["input_ids"])
    assert page.lab.decode(page.tokens[:, start:]) == [page.lab.generate(query, white, page.intervention, max_new_tokens=16)]
    assert [bool(verdict) for verdict in page.opened.values()] == [True] and torch.equal(page.tokens, page.again)
    assert not page.hf._forward_pre_hooks


@check("how-to/move.md")
def move(page: SimpleNamespace) -> None:
    vector, unit = page.vector, page.vector / page.norm
    near(last(page, page.intervention.at(hook="resid_post")), hooked(page, [3], lambda h: h * 0.5))
    near(page.everywhere.logits[0], hooked(page, [3, 5], lambda h: h + 1.5 * vector))
    near(page.at_last.logits[0], hooked(page, [3, 5], lambda h: h + 1.5 * vector, only_last=True))
    near(last(page, page.added), hooked(page, [5], lambda h: h + 2.0 * vector))
    near(last(page, page.ablated), hooked(page, [5], lambda h: h - (h @ unit)[..., None] * unit))
    near(last(page, page.put), hooked(page, [5], lambda h: h - (h @ unit)[..., None] * unit + vector))
    near(last(page, page.control), hooked(page, [4, 5], lambda h: h + 1.5 * unit))
    near(
        last(page, page.kept),
        hooked(page, [4, 5], lambda h: (h + 1.5 * unit) * h.norm(dim=-1, keepdim=True) / (h + 1.5 * unit).norm(dim=-1, keepdim=True)),
    )
    assert not torch.allclose(last(page, page.later), last(page, page.added), atol=1e-3)
    assert not page.model.hf._forward_pre_hooks and page.answer != "" and len(page.answers) == 2

    harmful, harmless = (torch.stack([page.fit.states[i] for i in side]) for side in page.fit.pairs())
    deltas = (harmful - harmless).double().transpose(0, 1)
    near(page.means.vectors[:, 0], torch.nn.functional.normalize(deltas.mean(1), dim=-1).float())
    first = torch.linalg.eigh(deltas.transpose(1, 2) @ deltas)[1][..., -1]  # steering-vectors: the first eigenvector, not centred
    near((page.ssd.vectors[:, 0] * first).sum(-1).abs().float(), torch.ones(8))
    centred = deltas - deltas.mean(1, keepdim=True)
    first = torch.linalg.eigh(centred.transpose(1, 2) @ centred)[1][..., -1]  # repeng: scikit-learn's PCA, which centres
    near((page.pca_diff.vectors[:, 0] * first).sum(-1).abs().float(), torch.ones(8))

    near(page.probabilities, torch.stack([page.model.to_logits(h[:, -1]).softmax(-1) for h in page.cache.stack("resid_post")], dim=1))
    near(page.pattern.sum(-1)[:, :, -1], torch.ones(2, 4))
    near(page.terms.sum(0), page.stream[-1])
    assert page.theirs.layers == (4, 5) and page.lengths == {4: page.norm, 5: page.norm}
