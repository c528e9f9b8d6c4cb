"""`activation_patching` against raw hooks that overwrite states, its laws, its table, and the edit `swap` that it is made of."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.experiments.patching import Patching
from guardlens.experiments.scores import RefusalLogOdds, kl, refusal_logodds
from tests import reference
from tests.experiments.test_attribution import BY_NAME, asked
from tests.experiments.test_attribution import family_model as loaded
from tests.strategies import context, gaussian

GREY, NOISE = presentations.blank("grey", 32), presentations.noise(size=32)
QUERIES = gl.organism.pairs().queries[:2] + gl.organism.pairs().queries[-3:]
WORDS = RefusalLogOdds(("To", "Please", "I want"))
"""Openings that the zoo's tokenizers know."""


def odds(logits, tokenizer, score=refusal_logodds):
    """The refusal log-odds by numpy."""
    log_p = log_softmax(logits.double().numpy(), axis=-1)
    ids = score.token_ids(tokenizer)
    return logsumexp(log_p[:, ids], axis=-1) - logsumexp(np.delete(log_p, ids, axis=-1), axis=-1)


def overwritten(hf, inputs, path, states, side="output", part=slice(None)):
    """Logits at the last column while a module takes or gives `states` there (left padding)."""
    module = hf.get_submodule(path)

    def changed(whole):
        whole = whole.clone()
        whole[:, -1, part] = states[:, part]
        return whole

    def after(module, args, out):
        return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

    if side == "output":
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(lambda module, args: (changed(args[0]), *args[1:]))
    try:
        with torch.no_grad():
            return hf(**inputs, use_cache=False).logits[:, -1]
    finally:
        handle.remove()


def values(table, **where):
    return table.where(**where).columns["value"]


class TestAgainstRawHooks:
    @pytest.mark.parametrize("donor", [text_only, NOISE], ids=["text", "noise"])
    def test_whole_states(self, vlm, hf_vlm, donor):
        hooks = {"resid_post": "", "attn_out": ".self_attn", "mlp_out": ".mlp"}
        table = gl.activation_patching(vlm, QUERIES, GREY, donor=donor, hooks=list(hooks), layers=[1, 6])
        given, taken = vlm.batch(QUERIES, donor).inputs, vlm.batch(QUERIES, GREY).inputs
        with torch.no_grad():
            expected = odds(hf_vlm(**given, use_cache=False).logits[:, -1], vlm.tokenizer)
            base = odds(hf_vlm(**taken, use_cache=False).logits[:, -1], vlm.tokenizer)
        for hook, inside in hooks.items():
            for layer in (1, 6):
                path = f"model.language_model.layers.{layer}{inside}"
                states = reference.outputs_of(hf_vlm, given, [path])[path][:, -1]
                patched = odds(overwritten(hf_vlm, taken, path, states), vlm.tokenizer)
                rows = table.where(hook=hook, layer=layer)
                np.testing.assert_allclose(rows.columns["value"], patched, atol=1e-4)
                np.testing.assert_allclose(rows.columns["base"], base, atol=1e-4)
                np.testing.assert_allclose(rows.columns["donor"], expected, atol=1e-4)
                assert np.abs(patched - base).max() > 1e-2

    def test_single_heads(self, vlm, hf_vlm):
        table = gl.activation_patching(vlm, QUERIES, GREY, hooks="z", layers=[5])
        heads, path = vlm.cfg.n_heads, "model.language_model.layers.5.self_attn.o_proj"
        given, taken = vlm.batch(QUERIES).inputs, vlm.batch(QUERIES, GREY).inputs
        states = reference.inputs_of(hf_vlm, given, [path])[path][:, -1]
        width = states.shape[-1] // heads
        assert set(table.columns["head"]) == set(range(heads))
        found = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            found.append(odds(overwritten(hf_vlm, taken, path, states, "input", part), vlm.tokenizer))
            np.testing.assert_allclose(values(table, head=head), found[-1], atol=1e-4)
        assert min(np.abs(a - b).max() for i, a in enumerate(found) for b in found[:i]) > 1e-3

    @pytest.mark.parametrize(
        ("name", "hook", "inside", "side"),
        [
            ("Gemma 3", "attn_out", "post_attention_layernorm", "output"),
            ("Gemma 3", "z", "self_attn.o_proj", "input"),
            ("Qwen2.5-VL", "z", "self_attn.o_proj", "input"),
            ("LLaVA-1.5", "mlp_out", "mlp", "output"),
        ],
    )
    def test_other_families(self, name, hook, inside, side):
        model, (shown, own) = loaded(name), asked(BY_NAME[name])
        table = gl.activation_patching(model, shown, own, hooks=hook, layers=[1], scores=[WORDS])
        path = f"{BY_NAME[name].blocks}.1.{inside}"
        kept = (reference.outputs_of if side == "output" else reference.inputs_of)(model.hf, model.batch(shown).inputs, [path])
        states = kept[path][:, -1]
        width = states.shape[-1] // (model.cfg.n_heads if hook == "z" else 1)
        for head in sorted(set(table.columns["head"])):
            part = slice(None) if head == -1 else slice(head * width, (head + 1) * width)
            patched = overwritten(model.hf, model.batch(shown, own).inputs, path, states, side, part)
            np.testing.assert_allclose(values(table, head=head), odds(patched, model.tokenizer, WORDS), atol=1e-4)
        assert np.abs(table.columns["value"] - table.columns["base"]).max() > 1e-3


class TestLaws:
    @pytest.mark.parametrize("hooks", ["resid_post", "attn_out", "z"])
    def test_a_patch_from_the_same_run_changes_nothing(self, vlm, hooks):
        scores = [refusal_logodds, kl]
        table = gl.activation_patching(vlm, QUERIES, GREY, donor=GREY, hooks=hooks, layers=[0, 4], scores=scores)
        np.testing.assert_allclose(table.columns["value"], table.columns["base"], atol=2e-5)
        np.testing.assert_array_equal(table.columns["donor"], table.columns["base"])
        assert table.summary()["recovered"].isna().all(), "without a gap there is nothing to recover"

    def test_the_whole_of_the_last_layer_is_the_source_itself(self, vlm):
        table = gl.activation_patching(vlm, QUERIES, GREY, layers=[7])
        np.testing.assert_allclose(table.columns["value"], table.columns["donor"], atol=1e-4)
        assert np.abs(table.columns["donor"] - table.columns["base"]).min() > 1e-3
        np.testing.assert_allclose(table.summary()["recovered"].dropna(), 1, atol=1e-3)

    def test_batches_and_lanes_do_not_matter(self, vlm, monkeypatch):
        whole = gl.activation_patching(vlm, QUERIES, GREY, hooks=["z", "mlp_out"], layers=[2])
        monkeypatch.setattr("guardlens.models.engine.limits.BRANCH_TOKENS_PER_FORWARD", 6)
        parts = gl.activation_patching(vlm, gl.keep(vlm, QUERIES, GREY, batch_size=2), hooks=["z", "mlp_out"], layers=[2])
        assert parts.frame.drop(columns=["value", "base", "donor"]).equals(whole.frame.drop(columns=["value", "base", "donor"]))
        for column in ("value", "base", "donor"):
            np.testing.assert_allclose(parts.columns[column], whole.columns[column], atol=1e-4)

    def test_the_text_twin_keeps_the_words_around_the_query(self, vlm):
        framed = presentations.framed(GREY, after=" please")
        table = gl.activation_patching(vlm, QUERIES, framed, layers=[7])
        twin = vlm.run(vlm.batch(QUERIES, presentations.framed(text_only, after=" please"))).logits
        np.testing.assert_allclose(table.columns["donor"], odds(twin[0], vlm.tokenizer), atol=1e-4)


@pytest.fixture(scope="module")
def table(vlm):
    return gl.activation_patching(vlm, QUERIES, GREY, hooks=["resid_post", "z"], layers=[3, 7])


def test_states_may_come_from_the_llm_beside_the_vlm(hf_vlm, processor):
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        hf = LlamaForCausalLM(hf_vlm.config.text_config).eval()
    model = gl.load(hf_vlm, processor=processor, llm=gl.load(hf, processor=processor.tokenizer))
    table = gl.activation_patching(model, QUERIES, GREY, hooks="attn_out", layers=[5])
    states = reference.outputs_of(hf, model.llm.batch(QUERIES).inputs, ["model.layers.5.self_attn"])["model.layers.5.self_attn"][:, -1]
    patched = overwritten(hf_vlm, model.batch(QUERIES, GREY).inputs, "model.language_model.layers.5.self_attn", states)
    np.testing.assert_allclose(table.columns["value"], odds(patched, model.tokenizer), atol=1e-4)
    assert table.facts["donor_model"] == model.llm.id != model.id


class TestTheTable:
    def test_columns_and_facts(self, table, vlm):
        assert list(table.frame.columns) == ["hook", "layer", "head", "query", "label", "cluster", "score", "value", "base", "donor"]
        assert not table.frame.duplicated(["hook", "layer", "head", "query", "score"]).any()
        assert len(table) == 2 * (1 + vlm.cfg.n_heads) * len(QUERIES)
        assert table.facts["presentation"] == "blank grey" and table.facts["donor"] == "text"
        assert table.facts["donor_model"] == vlm.llm.id and table.facts["units"] == {"refusal_logodds": refusal_logodds.unit}
        assert repr(table) == f"Patching(resid_post, z: {2 + 2 * vlm.cfg.n_heads} cells, {len(table)} rows)"

    def test_every_layer_is_the_default(self, vlm):
        assert set(gl.activation_patching(vlm, QUERIES[:1], GREY).columns["layer"]) == set(range(8))

    def test_saved_and_loaded_it_says_the_same(self, table, tmp_path):
        table.save(tmp_path / "patching")
        again = Patching.load(tmp_path / "patching").summary()
        np.testing.assert_allclose(again["change"], table.summary()["change"])

    def made(self, base, source, value):
        n = len(base)
        columns = {"hook": ["resid_post"] * n, "layer": [2] * n, "head": [-1] * n, "query": [f"q{i}" for i in range(n)],
                   "label": ["harmful"] * n, "cluster": [f"c{i // 2}" for i in range(n)], "score": ["refusal_logodds"] * n}  # fmt: skip
        return Patching({name: np.array(column) for name, column in columns.items()} | {"value": value, "base": base, "donor": source})

    @pytest.mark.parametrize("sign", [1, -1])
    def test_recovered_is_a_ratio_of_means_over_clusters(self, sign):
        rng = np.random.default_rng(1)
        base = np.repeat(rng.normal(0, 1, 20), 2)  # the two queries of a cluster tell the same
        source = base + sign * (3 + np.repeat(rng.normal(0, 1, 20), 2))
        value = base + 0.25 * (source - base) + np.repeat(rng.normal(0, 1, 20), 2)
        (row,) = self.made(base, source, value).summary().to_dict("records")
        assert row["recovered"] == pytest.approx((value - base).mean() / (source - base).mean())
        assert row["change"] == pytest.approx((value - base).mean()) and row["n"] == 40
        np.testing.assert_allclose([row["recovered_low"], row["recovered_high"]], by_hand(base, source, value), atol=0.015)

    def test_recovered_is_undefined_where_the_gap_may_be_none(self):
        rng = np.random.default_rng(1)
        base = rng.normal(0, 1, 40)
        (row,) = self.made(base, base + rng.normal(0, 1, 40), base + 1).summary().to_dict("records")
        assert np.isnan([row["recovered"], row["recovered_low"], row["recovered_high"]]).all() and row["change"] == pytest.approx(1)

    def test_plots(self, table, vlm):
        summary = table.summary()
        whole = Patching({name: column[table.columns["head"] == -1] for name, column in table.columns.items()}, table.facts)
        axes = whole.plot("change")
        assert [ax.get_title("left") for ax in axes] == [f"{label}: Δ {refusal_logodds.unit}" for label in ("harmful", "harmless")]
        (line,) = [line for line in axes[0].lines if line.get_label() == "resid_post"]
        rows = summary[(summary["label"] == "harmful") & (summary["hook"] == "resid_post")]
        np.testing.assert_allclose(line.get_ydata(), rows["change"])
        maps = table.plot("change")
        assert [ax.get_title("left") for ax in maps] == ["z · harmful (n = 2)", "z · harmless (n = 3)"]
        rows = summary[(summary["label"] == "harmless") & (summary["hook"] == "z")]
        np.testing.assert_allclose(maps[1].collections[0].get_array(), rows.pivot(index="head", columns="layer", values="change"))
        assert maps[0].figure.axes[-1].get_ylabel().partition("\n")[0] == f"Δ {refusal_logodds.unit}"
        assert whole.plot()[0].get_title("left") == "harmful: refusal log-odds recovered"
        plt.close("all")


def by_hand(base, source, value, draws=4000):
    """Percentile bootstrap of the ratio over clusters of two."""
    rng, n = np.random.default_rng(7), len(base) // 2
    ratios = []
    for _ in range(draws):
        picked = rng.integers(n, size=n)
        at = np.concatenate([2 * picked, 2 * picked + 1])
        ratios.append((value - base)[at].mean() / (source - base)[at].mean())
    return np.quantile(ratios, [0.025, 0.975])


class TestRefusals:
    @pytest.mark.parametrize("hook", ["resid_mid", "embed", "unembed"])
    def test_hooks_that_are_not_in_the_blocks_or_only_read(self, vlm, hook):
        with pytest.raises(errors.InterventionError, match=f"patching at '{hook}'"):
            gl.activation_patching(vlm, QUERIES, GREY, hooks=hook)

    def test_unknown_hooks_and_layers(self, vlm):
        with pytest.raises(errors.SiteError, match="did you mean"):
            gl.activation_patching(vlm, QUERIES, GREY, hooks="resid_pots")
        with pytest.raises(errors.SiteError, match=r"blocks\.8\.hook_resid_post, which this model does not have"):
            gl.activation_patching(vlm, QUERIES, GREY, layers=[8])

    def test_queries_of_one_name(self, vlm):
        with pytest.raises(errors.QueryError, match="two queries with one id"):
            gl.activation_patching(vlm, [QUERIES[0], QUERIES[0]], GREY)


class TestSwap:
    """`swap`: h -> r."""

    def states(self):
        return gaussian(1, 4, 6), gaussian(2, 4, 6)

    def test_whole_state_or_one_stretch(self):
        states, held = self.states()
        edit = lambda intervention: intervention.steps[0].edit(states, context(states, held=held))  # noqa: E731
        assert torch.equal(edit(iv.swap(iv.text_twin)), held)
        expected = torch.cat([states[:, :2], held[:, 2:4], states[:, 4:]], dim=1)
        assert torch.equal(edit(iv.swap(iv.text_twin, part=(1, 3))), expected)
        each = states
        for index in range(3):
            each = iv.swap(iv.text_twin, part=(index, 3)).steps[0].edit(each, context(states, held=held))
        assert torch.equal(each, held)

    @pytest.mark.parametrize("state", [iv.text_twin, iv.State(text_only, "z")], ids=["the edit's hook", "named"])
    def test_the_twin_is_held_at_the_hook_that_is_edited(self, vlm, hf_vlm, state):
        """z is as wide as the residual stream here, so a state of the wrong hook would fit."""
        path = "model.language_model.layers.5.self_attn.o_proj"
        given, taken = vlm.batch(QUERIES).inputs, vlm.batch(QUERIES, GREY).inputs
        states = reference.inputs_of(hf_vlm, given, [path])[path][:, -1]
        expected = odds(overwritten(hf_vlm, taken, path, states, "input"), vlm.tokenizer)
        logits = vlm.run(vlm.batch(QUERIES, GREY), iv.swap(state).at(hook="z", layers=[5])).logits[0]
        np.testing.assert_allclose(odds(logits, vlm.tokenizer), expected, atol=1e-4)

    def test_it_acts_where_its_state_is_held(self):
        intervention = iv.swap(iv.State(presentation=text_only, hook="z", positions="image"), part=(3, 4))
        assert (intervention.steps[0].site.hook, intervention.steps[0].site.positions) == ("z", "image")
        assert intervention.free and repr(intervention).startswith("swap(") and "part=(3, 4)" in repr(intervention)

    def test_strength_and_placebo(self, vlm):
        batch, site = vlm.batch(QUERIES, GREY), gl.Site(layers=(4,))
        swap = iv.swap(iv.text_twin).at(layers=4)
        interventions = [iv.nothing, swap, swap.scaled(0.5), swap.placebo(3)]
        own, there, half, turned = vlm.run(batch, interventions, read=[site], logits=None).reads[site][:, :, 0]
        torch.testing.assert_close(half, (own + there) / 2, atol=1e-5, rtol=0)
        torch.testing.assert_close((turned - own).norm(dim=-1), (there - own).norm(dim=-1), atol=1e-3, rtol=1e-4)

    def test_saved_and_loaded(self, tmp_path):
        intervention = iv.swap(iv.text_twin, part=(1, 4)).at(layers=[2])
        intervention.save(tmp_path / "swap.safetensors")
        again = gl.Intervention.load(tmp_path / "swap.safetensors")
        assert again.fingerprint == intervention.fingerprint != iv.swap(iv.text_twin, part=(2, 4)).at(layers=[2]).fingerprint
        assert again.steps[0].edit == intervention.steps[0].edit

    def test_refusals(self):
        states, held = self.states()
        with pytest.raises(errors.InterventionError, match="part 4 of 4"):
            iv.swap(iv.text_twin, part=(4, 4))
        for part, other in (((0, 4), held), (None, held[:, :4])):
            with pytest.raises(errors.MismatchError, match="for states of width 6"):
                iv.swap(iv.text_twin, part).steps[0].edit(states, context(states, held=other))


@pytest.fixture(scope="module")
def patched(vlm):
    return gl.activation_patching(vlm, QUERIES, GREY, layers=[2, 5])


class TestRowsThatAreLacking:
    def test_a_query_that_one_cell_lacks(self, patched):
        columns = patched.columns
        query = columns["query"][0]
        for keep in (~((columns["layer"] == 5) & (columns["query"] == query)), np.repeat(np.arange(len(patched)), 2)):
            with pytest.raises(errors.MismatchError, match=r"rows at resid_post of layer \d for \d queries\.\nExpected one for each"):
                Patching({name: values[keep] for name, values in columns.items()}, patched.facts).summary()

    def test_none(self, patched):
        for use in (patched.where(layer=7).summary, patched.where(layer=7).plot):
            with pytest.raises(errors.NumericsError, match="a table without rows"):
                use()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model": "organism"}, errors.ModelError, "something of type str"),
        ({"hooks": None}, errors.InterventionError, "something of type NoneType"),
        ({"hooks": []}, errors.InterventionError, "no hooks"),
        ({"hooks": [5]}, errors.InterventionError, "something of type int"),
        ({"layers": []}, errors.SiteError, "no layers"),
        ({"layers": [5.0]}, errors.SiteError, r"layer=5\.0"),
        ({"layers": [True]}, errors.SiteError, "layer=True"),
        ({"donor": "text"}, errors.PresentationError, "something of type str"),
        ({"scores": []}, errors.ArgumentError, "scores in a list"),
    ],
)
def test_met_at_the_door(vlm, unchecked, change, kind, said):
    with pytest.raises(kind, match=said):
        gl.activation_patching(**{"model": vlm, "queries": QUERIES, "presentation": GREY, **change})


def test_one_layer_and_layers_of_numpy(vlm, patched, unchecked):
    for layers in (5, np.int64(5), np.array([5, 5])):
        found = gl.activation_patching(vlm, QUERIES, GREY, hooks=["resid_post"] * 2, layers=layers)
        assert set(found.columns["layer"]) == {5} and len(found) == len(QUERIES)


def test_plots_are_asked_for_what_is_there(patched):
    for wrong, said in (({"value": "x"}, "the value 'x'"), ({"score": "nope"}, r"the score 'nope'\.\nExpected one of 'refusal_logodds'")):
        with pytest.raises(errors.ArgumentError, match=said):
            patched.plot(**wrong)


def test_a_donor_that_is_the_run_itself(llm):
    """A text model's framed prompt without its images is that prompt."""
    framed = presentations.framed(text_only, before="please . ")
    with pytest.warns(UserWarning, match=r"the donor 'text' gives what 'text \| framed' gives: no patch can change anything"):
        gl.activation_patching(llm, QUERIES, framed, layers=[1])
    gl.activation_patching(llm, QUERIES, framed, donor=framed, layers=[1])  # the placebo, asked for
