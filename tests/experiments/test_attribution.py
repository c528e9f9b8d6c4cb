"""`attribute` against heads taken apart by hand with raw hooks and float64 matrices, its sums on every family, and its table."""

from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import guardlens as gl
from guardlens import errors, presentations
from guardlens.data.presentations import text_only
from guardlens.directions import Directions
from guardlens.experiments.attribution import CONTRAST, KEYS, Attribution
from guardlens.models.checks import CHECKS
from guardlens.results.intervals import bootstrap
from guardlens.results.provenance import Provenance
from tests import reference
from tests.strategies import orthonormal
from tests.zoo import FAMILIES

GREY = presentations.blank("grey", 32)
QUERIES = gl.organism.pairs().queries[:3] + gl.organism.pairs().queries[-4:]
BY_NAME = {family.name: family for family in FAMILIES}
IN_PLACE = ("OLMo",)
"""It clips the very tensor that was given at hook_v."""
NEARSIGHTED = ("Idefics2",)
"""The windows of this test's model end before the image."""


@cache
def family_model(name):
    family = BY_NAME[name]
    return gl.load(family.model(), processor=family.processor())


def bases(model, rank=2, layers=None):
    numbers = tuple(range(model.cfg.n_layers)) if layers is None else layers
    vectors = orthonormal(5, len(numbers), rank, model.cfg.d_model, torch.float32)
    zeros = torch.zeros(len(numbers), model.cfg.d_model)
    return Directions(vectors, numbers, zeros, zeros, zeros[:, :0], "random", provenance=Provenance(model.id))


def asked(family):
    sizes = family.images if family.vision else ()
    images = [(Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)),) for i, (w, h) in enumerate(sizes)]
    texts = ("How to fold a paper boat?", "Please explain how to plant a tulip in a pot.")
    shown = [
        gl.Query(text, label, f"q{i}", images=images[i] if images else ())
        for i, (text, label) in enumerate(zip(texts, ("harmful", "harmless"), strict=True))
    ]
    return shown, presentations.own_images if family.vision else text_only


def values(table, presentation, **where):
    """Values `query direction` of one component."""
    rows = table.where(presentation=presentation, **where).frame
    return rows.pivot(index="query", columns="direction", values="value").loc[list(dict.fromkeys(rows["query"]))].to_numpy()


def total(table, presentation):
    rows = table.where(presentation=presentation).frame.groupby(["query", "direction"], sort=False)["value"].sum()
    return rows.unstack().loc[list(dict.fromkeys(table.columns["query"]))].to_numpy()


# The matrix that joins the heads, whether it is GPT-2's transposed one, the norm behind it, and what its gain lacks to the factor.
PARTS = {
    "LLaVA-1.5": ("self_attn.o_proj", False, None, 0),
    "Gemma 2": ("self_attn.o_proj", False, "post_attention_layernorm", 1),
    "Gemma 3": ("self_attn.o_proj", False, "post_attention_layernorm", 1),
    "OLMo 2": ("self_attn.o_proj", False, "post_attention_layernorm", 0),
    "Qwen2.5-VL": ("self_attn.o_proj", False, None, 0),
    "Qwen3-VL": ("self_attn.o_proj", False, None, 0),
    "GPT-2": ("attn.c_proj", True, None, 0),
    "Phi": ("self_attn.dense", False, None, 0),
    "GPT-NeoX": ("attention.dense", False, None, 0),
    "Granite": ("self_attn.o_proj", False, None, 0),
}


def heads_by_hand(hf, path, joined, vectors, n_heads, transposed, norm, one):
    """Each head's part `query head rank` from the input of the output projection, in float64, by weights alone."""
    out = hf.get_submodule(path)
    weight = out.weight.detach().double()
    slices = (weight.T if transposed else weight).unflatten(1, (n_heads, -1))  # d_model head d_head
    z = joined.double().unflatten(-1, (n_heads, -1))
    written = torch.einsum("qhd,mhd->qhm", z, slices)
    if norm:
        whole = written.sum(1) + (0 if out.bias is None else out.bias.double())
        module = hf.get_submodule(norm)
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        rms = (whole.square().mean(-1, keepdim=True) + epsilon).sqrt()
        written = written * ((module.weight.detach().double() + one) / rms)[:, None]
    return written @ vectors.double().T


@pytest.mark.parametrize("name", PARTS)
def test_heads_are_those_taken_apart_by_hand(name):
    model, family = family_model(name), BY_NAME[name]
    out, transposed, norm, one = PARTS[name]
    layer, directions = model.cfg.n_layers - 1, bases(model)
    shown, presentation = asked(family)
    table = gl.attribute(model, directions, shown, presentation)
    scale = getattr(model.hf.config.get_text_config(), "residual_multiplier", 1.0)
    batch = model.batch(shown, presentation)
    paths = [f"{family.blocks}.{block}.{out}" for block in range(layer + 1)]
    kept = reference.inputs_of(model.hf, batch.inputs, paths)
    largest = 0.0
    for block, path in enumerate(paths):
        where = norm and f"{family.blocks}.{block}.{norm}"
        joined = reference.last(kept[path], batch.mask)
        expected = scale * heads_by_hand(model.hf, path, joined, directions.at(layer), model.cfg.n_heads, transposed, where, one)
        for head in range(model.cfg.n_heads):
            mine = values(table, presentation.name, component="head", block=block, head=head)
            np.testing.assert_allclose(mine, expected[:, head], atol=2e-5 * float(expected.abs().max()))
        largest = max(largest, float(expected.abs().max()))
    biased = model.hf.get_submodule(paths[0]).bias is not None
    assert ("attn_rest" in set(table.columns["component"])) == biased
    assert largest > 0.01


def test_mlps_embedding_and_biases_are_the_modules_own():
    model = family_model("GPT-2")
    directions, (shown, _) = bases(model), asked(BY_NAME["GPT-2"])
    table = gl.attribute(model, directions, shown, [], layer=1)
    batch = model.batch(shown)
    blocks = [f"transformer.h.{block}" for block in range(2)]
    into = reference.inputs_of(model.hf, batch.inputs, blocks)
    out = reference.outputs_of(model.hf, batch.inputs, [f"{block}.mlp" for block in blocks])
    along = lambda states: (reference.last(states, batch.mask).double() @ directions.at(1).double().T).numpy()  # noqa: E731
    np.testing.assert_allclose(values(table, "text", component="embed"), along(into[blocks[0]]), atol=1e-6)
    for block, path in enumerate(blocks):
        np.testing.assert_allclose(values(table, "text", component="mlp", block=block), along(out[f"{path}.mlp"]), atol=1e-6)
        bias = (model.hf.get_submodule(path).attn.c_proj.bias.double() @ directions.at(1).double().T).detach().numpy()
        np.testing.assert_allclose(values(table, "text", component="attn_rest", block=block), np.tile(bias, (2, 1)), atol=2e-5)
    assert set(table.columns["block"]) == {-1, 0, 1} and set(table.columns["layer"]) == {1}


@pytest.mark.parametrize("name", BY_NAME)
def test_parts_sum_to_the_coordinate_in_every_family(name):
    family = BY_NAME[name]
    model, (shown, presentation) = family_model(name), asked(family)
    directions = bases(model)
    if family.lacks("text alone"):
        with pytest.raises(errors.ModelError, match="without an image"):
            gl.attribute(model, directions, shown, presentation)
        return
    table = gl.attribute(model, directions, shown, presentation)
    runs = {run.name: model.batch(shown, run) for run in dict.fromkeys((text_only, presentation))}
    assert list(dict.fromkeys(table.columns["presentation"])) == list(runs)
    path = f"{family.blocks}.{model.cfg.n_layers - 1}"
    for run, batch in runs.items():
        state = reference.last(reference.outputs_of(model.hf, batch.inputs, [path])[path], batch.mask)
        expected = (state.double() @ directions.vectors[-1].double().T).numpy()
        np.testing.assert_allclose(total(table, run), expected, atol=1e-4 * np.abs(expected).max())
    leftovers = {"rest", "between"} & set(table.columns["component"])
    assert leftovers <= set(family.adds), "what the family is not known to add comes from a part that was missed"


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if not family.lacks("text alone")])
def test_sources_sum_to_the_head_in_every_family(name):
    model, (shown, presentation) = family_model(name), asked(BY_NAME[name])
    directions = bases(model, rank=1)
    family = BY_NAME[name]
    if (family.lacks("values as mixed") or family.lacks("keys and values")) and name not in IN_PLACE:
        with pytest.raises(errors.ModelError, match="leave by_token_source out"):
            gl.attribute(model, directions, shown, presentation, by_token_source=True)
        return
    whole = gl.attribute(model, directions, shown, presentation).frame
    split = gl.attribute(model, directions, shown, presentation, by_token_source=True).frame
    keys = ["presentation", "query", "component", "block", "head"]
    whole, both = (frame.set_index(keys)["value"] if frame is whole else frame.groupby(keys)["value"].sum() for frame in (whole, split))
    np.testing.assert_allclose(both.loc[whole.index], whole, atol=1e-5 * whole.abs().max())
    image = split[split["token_source"] == "image"]
    assert (image.loc[image["presentation"] == "text", "value"] == 0).all()
    if family.vision and name not in NEARSIGHTED:
        assert image.loc[image["presentation"] == "own", "value"].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL"])
def test_sources_are_patterns_times_values_by_hand(name):
    """Grouped queries: two heads of keys and values for four of queries."""
    model, family = family_model(name), BY_NAME[name]
    directions, (shown, presentation) = bases(model), asked(family)
    table = gl.attribute(model, directions, shown, presentation, by_token_source=True)
    batch = model.batch(shown, presentation)
    image = batch.inputs["input_ids"] == model.hf.config.image_token_id
    paths = [f"{family.blocks}.{block}.self_attn.v_proj" for block in range(3)]
    kept = reference.outputs_of(model.hf, batch.inputs, paths)
    with torch.no_grad():
        patterns = model.hf(**batch.inputs, use_cache=False, output_attentions=True).attentions
    for block, path in enumerate(paths):
        weight = model.hf.get_submodule(path.replace("v_proj", "o_proj")).weight.detach().double()
        for head in range(4):
            v = kept[path][..., 8 * (head // 2) : 8 * (head // 2) + 8].double()  # query key d_head
            row = patterns[block][:, head, -1].double()  # left padding: the last row is the last token
            for source, tokens in (("image", image), ("text", ~image)):
                mixed = torch.einsum("qk,qkd->qd", row * tokens, v)
                expected = (mixed @ weight[:, 8 * head : 8 * head + 8].T @ directions.at(2).double().T).numpy()
                mine = values(table, "own", component="head", block=block, head=head, token_source=source)
                np.testing.assert_allclose(mine, expected, atol=2e-5)


@pytest.fixture(scope="module")
def table(vlm, basis):
    return gl.attribute(vlm, basis, QUERIES, [GREY, presentations.noise(size=32)], layer=4)


class TestTheTable:
    def test_columns_and_facts(self, table, vlm):
        assert list(table.frame.columns) == ["presentation", "query", "label", "cluster", "layer", "direction", "component", "block",
                                             "head", "token_source", "value"]  # fmt: skip
        assert not table.frame.duplicated(["presentation", "query", "direction", "component", "block", "head", "token_source"]).any()
        assert set(table.columns["direction"]) == {1, 2} and set(table.columns["token_source"]) == {"all"}
        heads = set(zip(*(table.where(component="head").columns[c] for c in ("block", "head")), strict=True))
        assert heads == {(block, head) for block in range(5) for head in range(vlm.cfg.n_heads)}
        assert table.facts == {
            "layer": 4, "directions": "test", "presentations": ["text", "blank grey", "noise"], "models": [vlm.id] * 3,
            "by_token_source": False,
        }  # fmt: skip
        assert repr(table) == f"Attribution(layer 4, {6 + 5 * vlm.cfg.n_heads} components, 3 presentations, {len(table)} rows)"

    def test_coordinates_are_those_of_collect(self, table, vlm, basis):
        for presentation in (text_only, GREY):
            states = gl.collect(vlm, QUERIES, presentation)
            np.testing.assert_allclose(total(table, presentation.name), basis.coordinates(states)[:, 4], atol=2e-4)

    def test_batches_and_a_text_that_is_asked_for_again_do_not_matter(self, table, vlm, basis):
        again = gl.attribute(vlm, basis, QUERIES, (GREY, text_only, presentations.noise(size=32)), layer=4, batch_size=3)
        assert again.frame.drop(columns="value").equals(table.frame.drop(columns="value"))
        np.testing.assert_allclose(again.columns["value"], table.columns["value"], atol=1e-4)

    def test_the_last_layer_of_the_directions_is_the_default(self, vlm, basis):
        one = Directions(basis.vectors[2:4], (2, 3), basis.harmful_mean[2:4], basis.harmless_mean[2:4], basis.spectrum[2:4], "two")
        assert gl.attribute(vlm, one, QUERIES, []).facts["layer"] == 3
        assert gl.attribute(vlm, basis[3], QUERIES, []).facts["layer"] == 7

    def test_summary_is_means_contrasts_and_paired_changes(self, table):
        frame, summary = table.frame, table.summary()
        harmful = np.array([query.label == "harmful" for query in QUERIES])
        clusters = np.array([query.cluster or query.pair or query.id for query in QUERIES])

        def per_query(presentation):
            rows = frame[(frame["presentation"] == presentation) & (frame["direction"] == 2) & (frame["component"] == "head")]
            return rows[(rows["block"] == 3) & (rows["head"] == 1)]["value"].to_numpy()

        def row(presentation, label):
            rows = summary[(summary["presentation"] == presentation) & (summary["label"] == label) & (summary["direction"] == 2)]
            return rows[(rows["component"] == "head") & (rows["block"] == 3) & (rows["head"] == 1)].iloc[0]

        text, grey = per_query("text"), per_query("blank grey")
        for label, chosen in (("harmful", harmful), ("harmless", ~harmful)):
            found = row("blank grey", label)
            assert found["value"] == pytest.approx(grey[chosen].mean()) and found["n"] == chosen.sum()
            assert found["change"] == pytest.approx((grey - text)[chosen].mean())
        gap = lambda at, per: np.nan if len({*harmful[at]}) < 2 else per[at][harmful[at]].mean() - per[at][~harmful[at]].mean()  # noqa: E731
        found = row("blank grey", CONTRAST)
        for per, (value, low, high) in ((grey, ("value", "low", "high")), (grey - text, ("change", "change_low", "change_high"))):
            plain = bootstrap(lambda at, per=per: gap(at, per), len(QUERIES), clusters)
            np.testing.assert_allclose(found[[value, low, high]].astype(float), [plain.value, plain.low, plain.high], rtol=1e-9)
        assert np.isnan(row("text", CONTRAST)["change"]) and row("text", CONTRAST)["n"] == len(QUERIES)

    def test_top_is_what_changes_most(self, table):
        summary = table.summary()
        rows = summary[(summary["label"] == CONTRAST) & (summary["direction"] == 1)]
        first, other = table.top(4), table.top(3, presentation="noise")
        changes = rows[rows["presentation"] == "blank grey"]["change"].abs().sort_values(ascending=False).to_numpy()
        np.testing.assert_array_equal(first["change"].abs(), changes[:4])
        assert set(first["presentation"]) == {"blank grey"} and set(other["presentation"]) == {"noise"} and len(other) == 3
        writes = rows[rows["presentation"] == "text"]["value"].abs().max()
        assert abs(table.top(1, presentation="text")["value"].iloc[0]) == writes
        for wrong in ({"presentation": "own"}, {"label": "neither"}, {"direction": 3}):
            with pytest.raises(errors.ArgumentError):
                table.top(**wrong)

    def test_saved_and_loaded_it_says_the_same(self, table, tmp_path):
        table.save(tmp_path / "parts")
        again = Attribution.load(tmp_path / "parts")
        assert again.facts == dict(table.facts)
        assert again.top(5)[["component", "block", "head"]].equals(table.top(5)[["component", "block", "head"]])

    def test_plot_shows_heads_and_all_else(self, table, vlm):
        axes = table.plot(label="harmful")
        assert [ax.get_title("left") for ax in axes[0]] == ["text", "blank grey", "noise", "blank grey − text", "noise − text"]
        summary = table.summary()
        rows = summary[(summary["label"] == "harmful") & (summary["direction"] == 1) & (summary["presentation"] == "noise")]
        heads = rows[rows["component"] == "head"].pivot(index="head", columns="block")
        np.testing.assert_allclose(axes[0, 2].collections[0].get_array(), heads["value"])
        np.testing.assert_allclose(axes[0, 4].collections[0].get_array(), heads["change"])
        bars = [bar.get_height() for bar in axes[1, 2].patches]
        np.testing.assert_allclose(bars, rows[rows["component"].isin(["embed", "mlp"])]["value"])
        assert [tick.get_text() for tick in axes[1, 0].get_xticklabels()] == ["emb", "0", "1", "2", "3", "4"]
        plt.close("all")


def test_the_plot_shows_one_source_or_both_together(vlm):
    model, family = family_model("LLaVA-1.5"), BY_NAME["LLaVA-1.5"]
    shown, presentation = asked(family)
    table = gl.attribute(model, bases(model, 1), shown, presentation, by_token_source=True)
    cells = {
        source: np.asarray(table.plot("harmful", token_source=source)[0, 1].collections[0].get_array())
        for source in (None, "image", "text")
    }
    np.testing.assert_allclose(cells["image"] + cells["text"], cells[None], atol=1e-9)
    assert np.abs(cells["image"]).max() > 1e-3 and not np.allclose(cells["image"], cells["text"])
    plt.close("all")


def test_the_interval_of_a_sum_is_not_the_sum_of_intervals(monkeypatch):
    model, family = family_model("LLaVA-1.5"), BY_NAME["LLaVA-1.5"]
    shown, presentation = asked(family)
    table = gl.attribute(model, bases(model, 1), shown, presentation, by_token_source=True)
    drawn = []
    monkeypatch.setattr(
        "guardlens.results.plots.components.component_maps", lambda frame, axes: drawn.append(frame[frame["component"] == "head"])
    )
    table.plot("harmful")
    table.plot("harmful", token_source="image")
    both, image = (frame[frame["panel"] == presentation.name] for frame in drawn)
    expected = table.summary().query("label == 'harmful' and presentation == @presentation.name and token_source == 'image'")
    assert both[["low", "high"]].isna().all(axis=None) and both["value"].notna().all()
    np.testing.assert_allclose(image[["value", "low", "high"]], expected[["value", "low", "high"]])


def test_the_llm_beside_the_vlm_comes_first(hf_vlm, processor, basis):
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        other = gl.load(LlamaForCausalLM(hf_vlm.config.text_config).eval(), processor=processor.tokenizer)
    both = gl.load(hf_vlm, processor=processor, llm=other)
    basis = replace(basis, provenance=both.provenance)
    table = gl.attribute(both, basis, QUERIES, GREY, layer=3)
    assert table.facts["models"] == [other.id, both.id]
    states = gl.collect(other, QUERIES)
    np.testing.assert_allclose(total(table, "text"), basis.coordinates(states)[:, 3], atol=2e-4)
    assert not np.allclose(total(table, "text"), basis.coordinates(gl.collect(both, QUERIES))[:, 3], atol=1e-2)


def test_gated_cross_attention_looks_at_the_image_alone():
    """Llama 3.2 Vision: block 1 runs beside an image only, and its gates multiply what it adds."""
    name = "Llama 3.2 Vision"
    model, (shown, own) = family_model(name), asked(BY_NAME[name])
    directions = bases(model)
    table = gl.attribute(model, directions, shown, own, by_token_source=True)
    batch, path = model.batch(shown, own), f"{BY_NAME[name].blocks}.1"
    joined = reference.inputs_of(model.hf, batch.inputs, [f"{path}.cross_attn.o_proj"])[f"{path}.cross_attn.o_proj"]
    gate = model.hf.get_submodule(path).cross_attn_attn_gate.detach().double().tanh()
    args = (model.cfg.n_heads, False, None, 0)
    expected = gate * heads_by_hand(model.hf, f"{path}.cross_attn.o_proj", reference.last(joined, batch.mask), directions.at(2), *args)
    for head in range(model.cfg.n_heads):
        np.testing.assert_allclose(values(table, "own", block=1, head=head, token_source="image"), expected[:, head], atol=1e-5)
        assert (values(table, "own", block=1, head=head, token_source="text") == 0).all()
    assert float(expected.abs().max()) > 1e-3 and abs(float(gate) - 1) > 0.1
    assert not {"rest", "attn_rest"} & set(table.columns["component"])
    assert 1 not in table.where(presentation="text").columns["block"] and 1 in table.where(presentation="own").columns["block"]
    summary = table.summary()
    rows = summary[(summary["block"] == 1) & (summary["presentation"] == "own") & (summary["label"] == "harmful")]
    np.testing.assert_allclose(rows["change"], rows["value"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_adapted_and_half_precision_models():
    """LoRA in the output projection is part of what a head writes; in bfloat16 the parts still sum to the state that was computed."""
    import peft

    family = BY_NAME["LLaVA-1.5"]
    hf = peft.get_peft_model(family.model(), peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).eval()
    model, (shown, own) = gl.load(hf, processor=family.processor()), asked(family)
    table = gl.attribute(model, bases(model), shown, own)
    path = f"base_model.model.{family.blocks}.1.self_attn.o_proj"
    joined = reference.last(reference.inputs_of(hf, model.batch(shown, own).inputs, [path])[path], model.batch(shown, own).mask)
    module = hf.get_submodule(path)
    weight = (module.base_layer.weight + module.get_delta_weight("default")).detach().double()
    for head in range(4):
        expected = joined[:, 8 * head : 8 * head + 8].double() @ weight[:, 8 * head : 8 * head + 8].T @ bases(model).at(2).double().T
        np.testing.assert_allclose(values(table, "own", component="head", block=1, head=head), expected, atol=2e-5)
    half = gl.load(family.model().bfloat16(), processor=family.processor())
    table = gl.attribute(half, bases(half), shown, own, by_token_source=True)
    np.testing.assert_allclose(total(table, "own"), bases(half).coordinates(gl.collect(half, shown, own))[:, 2], atol=2e-3)


class TestRefusals:
    def test_sources_without_eager_attention(self, vlm, basis):
        assert vlm.hf.config.get_text_config()._attn_implementation != "eager"
        with pytest.raises(errors.SiteError, match='attn_implementation="eager"'):
            gl.attribute(vlm, basis, QUERIES, GREY, by_token_source=True)

    def test_gated_heads(self):
        model, (shown, presentation) = family_model("Qwen3.5"), asked(BY_NAME["Qwen3.5"])
        with pytest.raises(errors.ModelError, match=r"heads in block 1 that differ from pattern times values by .* of the largest"):
            gl.attribute(model, bases(model), shown, presentation, by_token_source=True)

    def test_directions_of_another_hook_width_or_model(self, vlm, llm, basis):
        elsewhere = Directions(basis.vectors, basis.layers, basis.harmful_mean, basis.harmless_mean, basis.spectrum, "test", hook="mlp_out")
        with pytest.raises(errors.MismatchError, match="of width 128 at mlp_out"):
            gl.attribute(vlm, elsewhere, QUERIES, GREY)
        with pytest.raises(errors.MismatchError, match="of the model"):
            gl.attribute(llm, basis, QUERIES, [])

    def test_layers_without_directions(self, vlm, basis):
        with pytest.raises(errors.SiteError, match="layer 12"):
            gl.attribute(vlm, basis, QUERIES, GREY, layer=12)
        with pytest.raises(errors.SiteError, match="layer 12"):
            gl.attribute(vlm, basis[3], QUERIES, GREY, layer=12)

    def test_queries_without_labels_or_names_of_their_own(self, vlm, basis):
        with pytest.raises(errors.QueryError, match="without a label"):
            gl.attribute(vlm, basis, ["How to fold a paper boat?"], GREY)
        with pytest.raises(errors.QueryError, match="two queries with one id"):
            gl.attribute(vlm, basis, [*QUERIES, QUERIES[0]], GREY)
        with pytest.raises(errors.PresentationError, match="two presentations of one name"):
            gl.attribute(vlm, basis, QUERIES, [GREY, presentations.blank("grey", 16)])


@pytest.fixture(scope="module")
def parts(vlm, basis):
    return gl.attribute(vlm, basis, QUERIES, GREY, layer=2)


class TestRowsThatAreLacking:
    def test_a_query_that_one_presentation_lacks(self, parts):
        """It would count as 0 there."""
        columns = parts.columns
        keep = ~((columns["presentation"] == "blank grey") & (columns["query"] == columns["query"][0]))
        lost = Attribution({name: values[keep] for name, values in columns.items()}, parts.facts)
        for use in (lost.summary, lost.top, lost.plot):
            with pytest.raises(errors.MismatchError, match=r"6 rows of 6 queries for .* in 'blank grey'\.\nExpected one for each of the 7"):
                use()

    def test_rows_that_are_there_twice(self, parts):
        twice = Attribution({name: np.concatenate([values, values]) for name, values in parts.columns.items()}, parts.facts)
        with pytest.raises(errors.MismatchError, match="14 rows of 7 queries"):
            twice.summary()

    def test_none(self, parts):
        for use in (parts.where(query="nobody").summary, parts.where(query="nobody").top, parts.where(query="nobody").plot):
            with pytest.raises(errors.NumericsError, match="a table without rows"):
                use()

    def test_one_class_alone_has_no_mean_of_the_other(self, parts):
        one, whole = (table.summary().set_index(["presentation", "label", *KEYS]) for table in (parts.where(label="harmful"), parts))
        harmful = one.xs("harmful", level="label")
        np.testing.assert_allclose(harmful["value"], whole.xs("harmful", level="label").loc[harmful.index, "value"])
        assert one.xs("harmless", level="label")["value"].isna().all() and one.xs(CONTRAST, level="label")["value"].isna().all()

    def test_what_is_handed_out_is_a_copy(self, parts):
        summary = parts.summary()
        summary["value"] = 0.0
        assert parts.summary()["value"].abs().max() > 0


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model": None}, errors.ModelError, "something of type NoneType"),
        ({"directions": None}, errors.MismatchError, "something of type NoneType"),
        ({"directions": torch.ones(128)}, errors.MismatchError, "something of type Tensor"),
        ({"presentations": None}, errors.PresentationError, "something of type NoneType"),
        ({"presentations": [GREY, "text"]}, errors.PresentationError, "something of type str"),
        ({"layer": True}, errors.SiteError, "layer=True"),
        ({"layer": [5]}, errors.SiteError, r"layer=\[5\]"),
        ({"layer": 5.0}, errors.SiteError, r"layer=5\.0"),
        ({"layer": "5"}, errors.SiteError, "layer='5'"),
        ({"batch_size": 2.0}, errors.ArgumentError, "batch_size="),
    ],
)
def test_met_at_the_door(vlm, basis, unchecked, change, kind, said):
    given = {"model": vlm, "directions": basis, "queries": QUERIES, "presentations": GREY}
    with pytest.raises(kind, match=said):
        gl.attribute(**{**given, **change})


def test_tables_are_asked_for_what_they_have(parts, unchecked):
    with pytest.raises(errors.ArgumentError, match=r"the token source 'image'\.\nExpected one of \['all'\]"):
        parts.plot(token_source="image")
    for k in (-1, 1.5, True, "3"):
        with pytest.raises(errors.ArgumentError, match="Found k="):
            parts.top(k)


def test_a_direction_that_is_not_there(vlm, basis):
    vectors = basis.vectors.clone()
    vectors[2] = 0
    with pytest.raises(errors.NumericsError, match=r"zero at the layers \[2\]"):
        gl.attribute(vlm, replace(basis, vectors=vectors), QUERIES, GREY, layer=2)


def test_the_queries_that_made_the_directions(vlm):
    ssd = gl.directions.ssd(gl.collect(vlm, gl.QueryPairs(QUERIES[:3], gl.organism.pairs().harmless[:3])))
    with pytest.warns(UserWarning, match=r"3 of the 7 queries made the directions 'ssd\(rank=1\)'"):
        gl.attribute(vlm, ssd, QUERIES, GREY, layer=2)


def test_blocks_that_add_something_else_are_said(hf_vlm, processor, basis, monkeypatch):
    """As `gl.load` does of a family that the tests don't know; without it, the mistake hides in `rest`."""
    model = gl.load(hf_vlm, processor=processor)
    object.__setattr__(model.cfg, "proven", False)
    monkeypatch.setitem(CHECKS, "residual stream adds up", lambda model: (False, "up to 0.3"))
    said = r"a family that is new to guardlens, has attn_out or mlp_out that are not what its blocks add \(up to 0\.3\)"
    with pytest.warns(UserWarning, match=said):
        gl.attribute(model, basis, QUERIES, [], layer=2)
    for hooks in ("mlp_out", "attn_out", "z", ["resid_post", "mlp_out"]):
        with pytest.warns(UserWarning, match=said):
            gl.activation_patching(model, QUERIES, GREY, hooks=hooks, layers=[2])
    gl.activation_patching(model, QUERIES, GREY, layers=[2])
