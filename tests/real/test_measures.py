"""Whole analyses on a dozen pairs of mild requests, each number against raw hooks, numpy or sklearn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import guardlens as gl
from guardlens import defences, directions, judges, presentations, scores
from guardlens import interventions as iv
from tests import reference
from tests.real.test_reading import near
from tests.reference import at_last

NEW = 6


def inputs_of(model, queries, shown):
    return model.batch(queries, shown).inputs


@pytest.fixture(scope="module")
def states(model, hf, pairs):
    """The last token's states of every query on its own, by raw hooks: query, layer, width."""
    found = []
    for query in pairs.queries:
        kept = {}
        reference.with_hooks(hf, inputs_of(model, query, presentations.text_only), keep=kept)
        found.append(torch.stack([kept[layer][0, -1] for layer in sorted(kept)]))
    return torch.stack(found)


def test_collected_states(text, states):
    near(text.states, states)


def test_directions_are_those_of_numpy(text, ssd, states):
    fit = states.double().numpy()
    differences = fit[:6] - fit[12:18]
    for layer in text.layers:
        _, values, rows = np.linalg.svd(differences[:, layer], full_matrices=False)
        v = rows[0] * np.sign((differences[:, layer] @ rows[0]).sum())
        np.testing.assert_allclose(ssd.spectrum[layer], values, atol=1e-3 * values[0])
        if values[1] < 0.95 * values[0]:
            np.testing.assert_allclose(ssd.at(layer)[0], v, atol=1e-3)
    means = directions.diff_in_means(text)
    expected = fit[:12].mean(0) - fit[12:].mean(0)
    np.testing.assert_allclose(means.vectors[:, 0], expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-4)


def test_compare(model, text, ssd, states, shown):
    other = shown if model.sees_images else presentations.framed(shown, after=" Please answer in one sentence.")
    rest = np.r_[6:12, 18:24]
    asked, alone = text.select(rest), states[rest]
    run = gl.collect(model, asked.queries, other)
    table = gl.compare(asked, run, ssd, draws=50).frame
    for layer in text.layers[:: max(1, len(text.layers) // 6)]:
        along = alone[:, layer] @ ssd.at(layer)[0]
        row = table[(table["metric"] == "auroc") & (table["layer"] == layer)].iloc[0]
        assert row["value"] == pytest.approx(roc_auc_score(asked.harmful, along))
        moved = (run.at(layer) - alone[:, layer]) @ ssd.at(layer)[0] / alone[:, layer].norm(dim=-1).mean()
        row = table[(table["metric"] == "drift_along") & (table["layer"] == layer)].iloc[-1]
        assert row["value"] == pytest.approx(float(moved.mean()), abs=1e-4)


def refusal(model, logits):
    """Log-odds of the openings of a refusal, from their definition."""
    openings = {model.tokenizer(text, add_special_tokens=False).input_ids[0] for text in scores.refusal_logodds.starts}
    ids = sorted(openings - {model.tokenizer.unk_token_id})
    p = logits.double().softmax(-1)[:, ids].sum(-1)
    return (p.log() - (1 - p).log()).float()


def test_sweep(model, hf, ssd, held_out, middle, shown):
    layers, strengths = [1, middle, len(reference.blocks(hf)) - 1], [0.5, 1.0]
    size = 0.2 * float(ssd.harmless_mean[middle].norm())
    effect = gl.sweep(model, iv.add(ssd, size), held_out, shown, layers=layers, strengths=strengths)
    inputs = inputs_of(model, held_out, shown)
    base = reference.with_hooks(hf, inputs)[:, -1]
    ids = [query.id for query in held_out]
    for layer in layers:
        for strength in strengths:
            v = ssd.at(layer)[0]
            edit = at_last(lambda h, v=v, strength=strength: h + strength * size * v)
            edited = reference.with_hooks(hf, inputs, {layer: edit})[:, -1]
            frame = effect.frame.query("variant == 'edit' and layer == @layer and strength == @strength")
            odds = frame[frame["score"] == "refusal_logodds"].set_index("query").loc[ids]
            np.testing.assert_allclose(odds["value"], refusal(model, edited), atol=5e-3)
            np.testing.assert_allclose(odds["base"], refusal(model, base), atol=5e-3)
            kl = (base.softmax(-1) * (base.log_softmax(-1) - edited.log_softmax(-1))).sum(-1)
            np.testing.assert_allclose(frame[frame["score"] == "kl"].set_index("query").loc[ids]["value"], kl, atol=1e-3, rtol=1e-2)


def test_activation_patching(model, hf, held_out, middle, shown):
    source = presentations.text_only if model.sees_images else presentations.framed(shown, before="Please be kind. ")
    table = gl.activation_patching(model, held_out, shown, donor=source, hooks="resid_post", layers=[middle])
    kept = {}
    given = reference.with_hooks(hf, inputs_of(model, held_out, source), keep=kept)[:, -1]
    inputs = inputs_of(model, held_out, shown)
    patched = reference.with_hooks(hf, inputs, {middle: at_last(lambda h: kept[middle][:, -1])})[:, -1]
    rows = table.frame.set_index("query").loc[[query.id for query in held_out]]
    for column, logits in (("value", patched), ("donor", given), ("base", reference.with_hooks(hf, inputs)[:, -1])):
        np.testing.assert_allclose(rows[column], refusal(model, logits), atol=5e-3)


def test_attribution_sums_to_the_coordinate(model, ssd, held_out, middle, states, pairs):
    parts = gl.attribute(model, ssd, held_out, presentations.text_only, layer=middle)
    whole = parts.frame.groupby("query")["value"].sum()
    places = [pairs.queries.index(query) for query in held_out]
    expected = states[places, middle] @ ssd.at(middle)[0]
    mine = whole[[query.id for query in held_out]].to_numpy()
    np.testing.assert_allclose(mine, expected, atol=1e-4 * float(states[places, middle].norm(dim=-1).max()))
    assert {"embed", "head", "mlp"} <= set(parts.columns["component"])


def asked(model, arms, queries, shown, judge=judges.keyword, **more):
    return gl.evaluate(model, arms, queries, shown, judge=judge, max_new_tokens=NEW, **more)


@pytest.fixture(scope="module")
def push(ssd, middle):
    """How far the guard moves a state."""
    return 0.5 * float(ssd.harmless_mean[middle].norm())


@pytest.fixture(scope="module")
def arms(ssd, middle, push):
    return {"none": defences.none, "guard": iv.add(ssd, push).at(layers=[middle])}


@pytest.fixture(scope="module")
def evaluated(model, arms, held_out, shown):
    return asked(model, arms, held_out, shown)


def test_evaluate(model, hf, arms, evaluated, held_out, shown, middle, ssd, push):
    inputs = inputs_of(model, held_out, shown)
    edit = at_last(lambda h: h + push * ssd.at(middle)[0])
    hook = lambda m, a, out: edit(out) if out.shape[1] > 1 else out  # noqa: E731
    for name in arms:
        handle = reference.blocks(hf)[middle].register_forward_hook(hook) if name == "guard" else None
        with torch.no_grad():
            pad = hf.generation_config.pad_token_id or 0
            tokens = hf.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=pad)[:, inputs["input_ids"].shape[1] :]
        if handle:
            handle.remove()
        said = [text.strip() for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        rows = evaluated.frame[evaluated.frame["defence"] == name].set_index("query").loc[[query.id for query in held_out]]
        assert rows["answer"].tolist() == said
        verdicts = [judges.keyword(query, text) for query, text in zip(held_out, said, strict=True)]
        assert rows["verdict"].tolist() == verdicts
        assert evaluated.rate("asr", name, shown.name).value == pytest.approx(np.mean([v == "answered" for v in verdicts[:6]]))
        assert evaluated.rate("over_refusal", name, shown.name).value == pytest.approx(np.mean([v == "refused" for v in verdicts[6:]]))


def interrupted(monkeypatch, times, call):
    """A call that Ctrl-C ends when it has made so many batches, and the number that it made."""
    made, batch = [], gl.HookedModel.batch

    def counted(self, *arguments, **options):
        made.append(1)
        if len(made) > times:
            raise KeyboardInterrupt
        return batch(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gl.HookedModel, "batch", counted)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_an_interrupted_evaluation_goes_on(model, arms, evaluated, held_out, shown, tmp_path, monkeypatch):
    call = lambda: asked(model, arms, held_out, shown, out=tmp_path / "run", batch_size=2)  # noqa: E731
    interrupted(monkeypatch, 5, call)
    assert 0 < len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) < len(evaluated)
    resumed = call()
    for column in ("defence", "query", "answer", "verdict"):
        assert resumed.columns[column].tolist() == evaluated.columns[column].tolist()


def test_an_interrupted_collection_goes_on(model, text, pairs, tmp_path, monkeypatch):
    call = lambda: gl.collect(model.llm, pairs, out=tmp_path / "run", batch_size=4)  # noqa: E731
    interrupted(monkeypatch, 4, call)
    near(call().states, text.states)
    near(gl.Activations.load(tmp_path / "run").states, text.states)
    with pytest.raises(gl.errors.GuardlensError):
        gl.collect(model.llm, pairs.queries[:3], out=tmp_path / "run")


def test_saved_states_and_tables(text, evaluated, tmp_path):
    text.save(tmp_path / "text.safetensors")
    assert torch.equal(gl.Activations.load(tmp_path / "text.safetensors").states, text.states)
    evaluated.save(tmp_path / "evaluation")
    again = type(evaluated).load(tmp_path / "evaluation")
    assert all(again.columns[name].tolist() == column.tolist() for name, column in evaluated.columns.items() if name != "gate")
