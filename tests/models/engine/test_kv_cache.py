"""What prompts begin with alike, computed once: found from tokens and pictures, never changing a result."""

import pytest
import torch

import guardlens as gl
from guardlens import interventions as iv
from guardlens import presentations
from guardlens.data.presentations import text_only
from guardlens.data.queries import Query
from guardlens.hooks import Site
from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.selftests import SelfTests
from guardlens.models.engine.strategies import strategy
from tests.models.architectures.test_families import BY_NAME, close, loaded
from tests.models.engine.strategies.test_branches import interventions_of
from tests.strategies import make_batch
from tests.zoo.family import TEXTS

WORDS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)


@pytest.fixture(params=list(BY_NAME), scope="module")
def name(request):
    return request.param


@pytest.fixture
def eager_to_share(monkeypatch):
    monkeypatch.setattr(limits, "PREFIX_WORTH_TOKENS", 1)


def shown(family, model):
    size = family.images[0]
    return presentations.blank("#3060c0", size[0]) if family.vision else text_only


class TestEveryFamily:
    def test_states_and_edits_behind_a_prefix_are_those_of_whole_runs(self, name, eager_to_share):
        family, model = BY_NAME[name], loaded(name)
        presentation = shown(family, model)
        batch = model.batch(TEXTS, presentation)
        prefix = model.share(batch)
        if prefix is None:
            assert family.lacks("branches") or model._tests.flaws.get(("prefixes", batch.beside_image)) or batch.common_start == 0
            return
        assert 0 < len(prefix) <= batch.common_start
        push = iv.custom(lambda states, context: states + 1.0).at(layers=[1], positions="instruction")
        sites = [Site(), Site(positions="post_instruction"), Site("attn_out")]
        sites = [site for site in sites if {point.hook for point in model.cfg.computed(True)} >= {site.hook}]
        sites = (
            sites[:2]
            if len({point.layer for point in model.cfg.computed(True) if point.hook == "attn_out"}) < model.cfg.n_layers
            else sites
        )
        mine, whole = model.run(batch.after(prefix), push, read=sites), model.run(batch, push, read=sites)
        close(mine.logits, whole.logits)
        for site in sites:
            close(mine.reads[site], whole.reads[site])

    def test_branches_behind_a_prefix_are_whole_runs(self, name, eager_to_share):
        family, model = BY_NAME[name], loaded(name)
        batch, interventions = model.batch(TEXTS, shown(family, model)), interventions_of(model)
        prefix = model.share(batch)
        if prefix is None:
            return
        kept = model.prefill(batch.after(prefix))
        assert bool(kept.flaw) == bool(family.lacks("branches"))
        close(model.run(kept, interventions).logits, model.run(batch, interventions, layout="tile").logits)
        again = model.batch(TEXTS[:2], batch.presentation)
        close(model.run(model.prefill(again.after(prefix)), interventions).logits, model.run(again, interventions, layout="tile").logits)

    def test_answers_behind_a_prefix_are_those_of_whole_prompts(self, name, eager_to_share):
        family, model = BY_NAME[name], loaded(name)
        batch = model.batch(TEXTS, shown(family, model))
        prefix, interventions = model.share(batch), [intervention.during("always") for intervention in interventions_of(model)[:3]]
        if prefix is not None:
            behind = model.run(batch.after(prefix), interventions, new_tokens=6).tokens
            assert torch.equal(behind, model.run(batch, interventions, new_tokens=6).tokens)


def test_most_families_share_their_prefix(eager_to_share):
    without = {
        name for name, family in BY_NAME.items() if loaded(name).share(loaded(name).batch(TEXTS, shown(family, loaded(name)))) is None
    }
    assert without == {name for name, family in BY_NAME.items() if family.lacks("branches")}


def test_the_common_start_ends_before_what_differs():
    def of(rows, image=(), pictures=(), side="left"):
        batch = make_batch([len(row) for row in rows], side)
        ids = torch.zeros_like(batch.inputs["input_ids"])
        ids[batch.mask] = torch.tensor([token for row in rows for token in row])
        picture = torch.zeros_like(batch.mask)
        picture[batch.mask] = torch.tensor([i in image for row in rows for i in range(len(row))])
        return Batch(batch.queries, text_only, {"input_ids": ids}, batch.mask, picture, batch.instruction, pictures).common_start

    for side in ("left", "right"):
        assert of([[1, 2, 3, 4], [1, 2, 5, 6, 7]], side=side) == 2
        assert of([[1, 2, 3], [1, 2, 3, 4]], side=side) == 2, "one token of each is left"
        assert of([[3, 2], [1, 2]], side=side) == 0
        assert of([[1, 9, 9, 4, 5], [1, 9, 9, 4, 6, 7]], image=(1, 2), pictures=("a", "a"), side=side) == 4
        assert of([[1, 9, 9, 4, 5], [1, 9, 9, 4, 6, 7]], image=(1, 2), pictures=("a", "b"), side=side) == 1
        assert of([[1, 9, 9, 4], [1, 9, 9, 9]], image=(1, 2, 3), pictures=("a", "a"), side=side) == 1


def test_what_is_kept_of_a_prefix_does_not_grow_with_the_prompts(vlm, eager_to_share):
    batch = vlm.batch(WORDS, GREY)
    prefix = vlm.share(batch)
    apart, packed = vlm.prefill(batch), vlm.prefill(batch.after(prefix))
    per_token = apart.bytes // batch.mask.numel()
    assert packed.bytes == per_token * (len(prefix) + int(batch.mask.sum()) - len(WORDS) * len(prefix))


@pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
class TestWhenItIsUsed:
    @pytest.fixture
    def widths(self, vlm, monkeypatch, eager_to_share):
        """How many tokens of each row every forward of the decoder gets."""
        seen = []
        decoder = vlm.hf.get_submodule(vlm.cfg.decoder)
        handle = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                tuple((kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]).shape[:2])
            ),
            with_kwargs=True,
        )
        yield seen
        handle.remove()

    def test_collecting_computes_it_once(self, vlm, widths):
        plain = torch.cat([vlm.run(vlm.batch([text], GREY), read=[Site()]).reads[Site()][0] for text in WORDS])
        whole = vlm.batch(WORDS, GREY).mask.shape[1]
        vlm.share(vlm.batch(WORDS, GREY))
        widths.clear()
        found = gl.collect(vlm, WORDS, GREY, batch_size=2)
        close(found.states, plain)
        (first, *rest) = widths
        assert first[0] == 1 and [rows for rows, _ in rest] == [1, 1]
        assert all(tokens < whole for _, tokens in rest)

    def test_not_where_the_image_is_read_or_edited(self, vlm, widths, basis):
        batch = vlm.batch(WORDS, GREY)
        prefix = vlm.share(batch)
        widths.clear()
        for site, intervention in (
            (Site(positions="image"), iv.nothing),
            (Site(), iv.amplify(basis).at(positions="all")),
            (Site("embed"), iv.nothing),
        ):
            close(
                vlm.run(batch.after(prefix), intervention, read=[site]).reads[site], vlm.run(batch, intervention, read=[site]).reads[site]
            )
        assert [shape[1] for shape in widths[:4]] == [batch.mask.shape[1]] * 4

    def test_not_beside_another_picture(self, vlm, widths):
        prefix = vlm.share(vlm.batch(WORDS, GREY))
        white = vlm.batch(WORDS, presentations.blank("white", 32))
        assert prefix.begins(white) is None
        close(vlm.run(white.after(prefix)).logits, vlm.run(white).logits)

    def test_as_much_of_it_as_fits(self, vlm, widths):
        long = vlm.share(vlm.batch(["how to mend the hat ?", "how to mend the fern ."], GREY))
        batch = vlm.batch(WORDS, GREY)
        shorter = long.begins(batch)
        assert 0 < len(shorter) < len(long)
        close(vlm.run(batch.after(long)).logits, vlm.run(batch).logits)
        assert long.begins(vlm.batch(["how to mend the hat ?"], GREY)) is long

    def test_own_pictures_share_the_template_alone(self, vlm, widths):
        from tests.models.architectures.test_families import picture

        asked = [Query(text, images=(picture(row, (32, 32)),)) for row, text in enumerate(WORDS)]
        batch = vlm.batch(asked, presentations.own_images)
        assert batch.common_start <= int(batch.image[0].long().argmax())

    def test_prompts_that_are_computed_do_not_keep_it(self, vlm, eager_to_share):
        batch = vlm.batch(WORDS, GREY)
        prefill = vlm.prefill(batch.after(vlm.share(batch)))
        assert prefill.cache.shares_prefix and prefill.batch.prefix is prefill.cache.batch.prefix is None

    def test_not_where_it_saves_little(self, vlm):
        assert vlm.share(vlm.batch(WORDS[:2], GREY)) is None

    def test_never_where_the_self_check_fails(self, vlm, eager_to_share, monkeypatch):
        batch = vlm.batch(WORDS, GREY)
        monkeypatch.setitem(vlm.__dict__, "_tests", SelfTests(vlm._engine))
        monkeypatch.setattr(strategy, "agree", lambda mine, expected: False)
        assert vlm.share(batch) is None
        assert vlm._tests.flaws["prefixes", True] == "prompts that continue from a common beginning have other states than on their own"
        run = vlm.run(batch, [iv.nothing, iv.nothing])
        assert (run.layout, run.why) == ("tile", "branches without an edit differ from the plain run")
