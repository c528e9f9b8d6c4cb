"""`collect` against raw PyTorch hooks."""

import pytest
import torch

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.data.queries import QueryPairs
from guardlens.hooks import Site
from tests import reference

PAIRS = QueryPairs(gl.organism.pairs().harmful[:3], gl.organism.pairs().harmless[:3])
GREY = presentations.blank("grey", 32)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


def raw(model, queries, presentation):
    """States `query layer d_model` at the last token, one query at a time, so without any padding."""
    rows = []
    for query in queries:
        kept = {}
        reference.with_hooks(model.hf, model.batch([query], presentation).inputs, keep=kept)
        rows.append(torch.stack([kept[layer][0, -1] for layer in sorted(kept)]))
    return torch.stack(rows)


@pytest.mark.parametrize("presentation", [text_only, GREY, presentations.noise(size=32), presentations.own_images], ids=lambda p: p.name)
def test_states_equal_raw_hooks(vlm, presentation):
    found = gl.collect(vlm, PAIRS, presentation)
    close(found.states, raw(vlm, PAIRS.queries, presentation))
    assert found.layers == tuple(range(8)) and found.presentation == presentation.name
    assert found.states.dtype == torch.float32 and not found.states.requires_grad


def test_image_changes_the_states(vlm):
    text, grey = (gl.collect(vlm, PAIRS, presentation).states for presentation in (text_only, GREY))
    assert (text - grey).abs().amax(dim=(1, 2)).min() > 1e-2


def test_pairs_come_harmful_first(vlm):
    found = gl.collect(vlm, PAIRS)
    assert [query.id for query in found.queries] == [query.id for query in (*PAIRS.harmful, *PAIRS.harmless)]
    assert found.harmful.tolist() == [True] * 3 + [False] * 3
    harmful, harmless = found.pairs()
    assert harmful.tolist() == [0, 1, 2] and harmless.tolist() == [3, 4, 5]


def test_batch_size_and_progress_do_not_matter(vlm, capsys):
    whole = gl.collect(vlm, PAIRS, GREY)
    assert capsys.readouterr() == ("", "")
    for size in (1, 4):
        with gl.progress_bars(True):
            parts = gl.collect(vlm, PAIRS, GREY, batch_size=size)
        close(parts.states, whole.states)
        assert parts.queries == whole.queries
    assert "collect, blank grey" in capsys.readouterr().err


def test_batches_are_no_larger_than_asked(vlm, monkeypatch):
    sizes, run = [], type(vlm).run

    def note(self, batch, *args, **options):
        sizes.append(len(batch.queries))
        return run(self, batch, *args, **options)

    monkeypatch.setattr(type(vlm), "run", note)
    gl.collect(vlm, PAIRS, batch_size=4)
    assert sizes == [4, 2]


def test_other_sites(vlm):
    batch = vlm.batch(PAIRS.queries, GREY)
    _, cache = vlm.run_with_cache(batch)
    found = gl.collect(vlm, PAIRS, GREY, site=Site("attn_out", (5, 2), "image"))
    for layer in (2, 5):
        expected = torch.stack([row[mask].mean(0) for row, mask in zip(cache["attn_out", layer], batch.image, strict=True)])
        close(found.at(layer), expected)
    assert set(found.layers) == {2, 5} and (found.hook, found.positions) == ("attn_out", "image")
    final = gl.collect(vlm, PAIRS, GREY, site=Site("ln_final.hook_out"))
    assert final.layers == (-1,)
    close(final.states[:, 0], cache["ln_final.hook_out"][:, -1])


def test_states_are_read_after_the_edits(vlm):
    intervention = iv.custom(lambda states, context: states * 2).at(layers=[2])
    plain, edited = (gl.collect(vlm, PAIRS, GREY, *interventions, batch_size=4).states for interventions in ((), (intervention,)))
    close(edited[:, :2], plain[:, :2])
    close(edited[:, 2], 2 * plain[:, 2])
    kept = {}

    def doubled(out):
        out = out.clone()
        out[:, -1] *= 2
        return out

    reference.with_hooks(vlm.hf, vlm.batch(PAIRS.queries, GREY).inputs, edits={2: doubled}, keep=kept)
    close(edited[:, 7], kept[7][:, -1])


def test_text_only_llm(llm):
    found = gl.collect(llm, PAIRS)
    assert found.states.shape == (6, 3, 32)
    close(found.states, raw(llm, PAIRS.queries, text_only))
    with pytest.raises(errors.PresentationError, match="'blank grey', which shows an image, for a text-only model"):
        gl.collect(llm, PAIRS, GREY)


def test_knows_where_it_comes_from(vlm, llm):
    mine, other = (gl.collect(model, ["how to mend the hat ?"]) for model in (vlm, llm))
    assert mine.provenance.model == vlm.id != other.provenance.model == llm.id
    assert mine.queries[0].text == "how to mend the hat ?" and mine.queries[0].label is None
    assert mine.provenance.versions["torch"] == torch.__version__


def test_no_queries(vlm):
    with pytest.raises(errors.QueryError, match=r"Found no queries.\nExpected at least one"):
        gl.collect(vlm, [])


class Border:
    """A presentation with an image whose name says nothing of it."""

    name = "border"

    def __call__(self, query):
        return GREY(query)


def test_says_what_was_edited_and_whether_an_image_was_shown(vlm, basis, tmp_path):
    intervention = iv.add(basis.truncate(1), 30.0).at(layers=[3])
    text, border, edited = (gl.collect(vlm, PAIRS, *shown) for shown in ((text_only,), (Border(),), (text_only, intervention)))
    assert (text.intervention, text.shows_images) == ("", False) and (border.intervention, border.shows_images) == ("", True)
    assert (edited.intervention, edited.shows_images) == (repr(intervention), False)
    streamed = gl.collect(vlm, PAIRS, GREY, intervention, out=tmp_path / "states")
    loaded = gl.Activations.load(tmp_path / "states")
    assert (streamed.intervention, streamed.shows_images) == (loaded.intervention, loaded.shows_images) == (repr(intervention), True)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model": None}, errors.ModelError, "something of type NoneType"),
        ({"model": "organism"}, errors.ModelError, "something of type str"),
        ({"site": None}, errors.SiteError, "something of type NoneType"),
        ({"site": "resid_post"}, errors.SiteError, r"something of type str[\s\S]*Site\('resid_post'\)"),
        ({"site": Site}, errors.SiteError, "the class Site itself"),
        ({"intervention": [iv.nothing, iv.nothing]}, errors.InterventionError, "something of type list"),
        ({"intervention": None}, errors.InterventionError, "something of type NoneType"),
        ({"batch_size": 1.5}, errors.ArgumentError, "batch_size=1.5"),
        ({"batch_size": True}, errors.ArgumentError, "batch_size=True"),
    ],
)
def test_met_at_the_door(vlm, unchecked, change, kind, said):
    with pytest.raises(kind, match=said):
        gl.collect(**{"model": vlm, "queries": PAIRS, **change})


def test_a_module_of_transformers_is_no_model(vlm, unchecked):
    with pytest.raises(errors.ModelError, match=r"LlavaForConditionalGeneration[\s\S]*gl\.load\(model, processor=processor\)"):
        gl.collect(vlm.hf, PAIRS)
