"""Where a cheaper way once gave something else without a word: each of these was red."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import guardlens as gl
from guardlens import errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import Prompt
from guardlens.data.queries import Query
from guardlens.experiments.scores import AnswerLogProb, kl, refusal_logodds
from guardlens.hooks import Site
from guardlens.models.engine import limits, scheduler
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.selftests import SelfTests
from guardlens.models.engine.strategies import BRANCHES, branches
from guardlens.models.processing.chat_template import pad_token_id
from tests.models.architectures.test_families import BY_NAME, a_push, batch_of, close, loaded, picture, pushing
from tests.models.engine.strategies.test_branches import interventions_of
from tests.zoo.family import TEXTS, tokenizer
from tests.zoo.text import SMALL, TEMPLATE

WORDS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)


@pytest.mark.parametrize("name", ["Llama 3.2 Vision", "LLaVA-1.5", "Qwen2.5-VL", "Gemma 3"])
def test_branches_that_hold_in_text_are_checked_again_beside_an_image(name):
    family = BY_NAME[name]
    model = gl.load(family.model(), processor=family.processor())
    long = model.batch([f"{text} {text} {text}" for text in TEXTS])
    assert model.run(long, interventions_of(model)).layout == "branch"
    batch = batch_of(family, model)
    run = model.run(batch, interventions_of(model)[:3])
    assert run.layout == ("tile" if family.lacks("branches") else "branch")
    close(run.logits, model.run(batch, interventions_of(model)[:3], layout="tile").logits)


@pytest.mark.filterwarnings("ignore:.* and 60 positions in")
@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "default"}])
def test_no_prefix_where_positions_depend_on_the_length_of_the_prompt(rope, monkeypatch):
    monkeypatch.setattr(limits, "PREFIX_WORTH_TOKENS", 1)
    config = LlamaConfig(**SMALL, max_position_embeddings=60, rope_parameters={"rope_theta": 10000.0, **rope})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gl.load(LlamaForCausalLM(config).eval(), processor=tokenizer(TEMPLATE))
    assert (model.share(model.batch(TEXTS)) is None) == (rope["rope_type"] == "dynamic")
    asked = [*TEXTS, *(f"{text} {text} {text} {text}" for text in TEXTS)]
    alone = torch.cat([model.run(model.batch(text), read=[Site()]).reads[Site()][0] for text in asked])
    close(gl.collect(model, asked, batch_size=4).states, alone, 1e-4)


class TestInPlace:
    def test_an_edit_that_works_in_place_obeys_gate_strength_and_placebo(self, vlm, basis):
        def in_place(states, context):
            states += 1.0
            return states

        batch = vlm.batch(WORDS, GREY)
        for change in (
            lambda intervention: intervention.when(gates.harmful(basis, 1e9)),
            lambda intervention: intervention.scaled(0.5),
            lambda intervention: intervention.placebo(),
            lambda intervention: intervention,
        ):
            mine, fresh = (change(iv.custom(fn).at(layers=[3])) for fn in (in_place, lambda states, context: states + 1.0))
            for layout in ("tile", "branch"):
                close(vlm.run(batch, [mine], layout=layout).logits, vlm.run(batch, [fresh], layout=layout).logits)

    def test_a_score_that_works_in_place_leaves_what_is_kept(self, vlm):
        class Halving:
            name, unit = "halving", "logits"

            def __call__(self, logits, base, tokenizer):
                base.mul_(0.5)
                return logits.mul_(0.5).amax(-1)

        kept, intervention = gl.keep(vlm, WORDS, GREY), pushing(a_push(vlm))
        before = gl.sweep(vlm, intervention, kept, scores=[kl]).columns["value"]
        gl.sweep(vlm, intervention, kept, scores=[Halving(), refusal_logodds])
        after = gl.sweep(vlm, intervention, kept, scores=[kl]).columns["value"]
        assert (before == after).all()


class TestWhoseItIs:
    def test_kept_prompts_of_a_model_with_another_llm_are_refused(self):
        family = BY_NAME["LLaVA-1.5"]
        alone = gl.load(family.model(), processor=family.processor())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            llm = gl.load(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), processor=tokenizer(TEMPLATE))
        both = gl.load(alone.hf, processor=alone.processor, llm=llm)
        kept = gl.keep(alone, TEXTS, GREY)
        with pytest.raises(errors.MismatchError, match="prompts kept by"):
            gl.sweep(both, iv.swap(iv.text_twin), kept)

    def test_a_prefill_of_other_weights_is_refused(self, vlm, processor):
        other = copy.deepcopy(vlm.hf)
        with torch.no_grad():
            other.lm_head.weight.add_(1)
        stranger = gl.load(other, processor=processor)
        kept = vlm.prefill(vlm.batch(WORDS, GREY))
        with pytest.raises(errors.MismatchError, match="prompts kept by"):
            stranger.run(kept, [iv.nothing, iv.nothing])

    def test_an_attached_guard_knows_the_cache_that_its_prompts_filled(self):
        model = loaded("Llama")
        intervention = iv.swap(iv.State(layer=0)).at(layers=[1]).during("always")
        one, other = (model.batch(text).inputs["input_ids"] for text in ("I want to paint it.", "I want to plant it."))
        width = min(one.shape[1], other.shape[1])
        with gl.attach(intervention, model.hf, model.processor), torch.no_grad():
            caches = [DynamicCache(), DynamicCache()]
            for ids, cache in zip((one, other), caches, strict=True):
                model.hf(input_ids=ids[:, -width:], past_key_values=cache, use_cache=True)
            with pytest.raises(errors.ModelError, match="behind the cache that they filled"):
                model.hf(input_ids=one[:, -1:], past_key_values=caches[0], use_cache=True)


def test_a_decode_step_that_needs_the_prompt_has_it(vlm):
    batch = vlm.batch(WORDS, GREY)
    intervention = iv.swap(iv.State(layer=0, positions="instruction")).at(layers=[1]).during("decode")
    close(vlm.run(batch, [iv.nothing, intervention]).logits, vlm.run(batch, [iv.nothing, intervention], layout="tile").logits)
    whole, kept = (vlm.run(prompts, [intervention], new_tokens=6).tokens for prompts in (batch, vlm.prefill(batch)))
    assert torch.equal(whole, kept)


def test_the_unembedding_is_read_without_logits(vlm):
    batch = vlm.batch(WORDS, GREY)
    run = vlm.run(batch, read=[Site("unembed")], logits=None)
    assert run.logits is None
    close(run.reads[Site("unembed")][0, :, 0], vlm.run(batch).logits[0])


def fresh(name):
    family = BY_NAME[name]
    return gl.load(family.model(), processor=family.processor())


class Mixed:
    """Shows an image beside those queries that have one."""

    name = "mixed"

    def __call__(self, query):
        return Prompt(query.text, query.images)


@pytest.fixture
def eager_to_share(monkeypatch):
    monkeypatch.setattr(limits, "PREFIX_WORTH_TOKENS", 1)


class TestFoundByTheSecondReader:
    @pytest.mark.parametrize("name", ["EXAONE 4.5", "HyperCLOVA X Vision V2", "Llama"])
    def test_answers_behind_a_prefix_are_checked_again_where_prompts_are_padded(self, name, eager_to_share):
        """Some families count positions from columns, padding included, whatever they are told."""
        model = fresh(name)
        for texts in ([TEXTS[0]] * 4, TEXTS):
            batch = model.batch(texts)
            whole = model.hf.generate(**batch.inputs, max_new_tokens=6, do_sample=False, pad_token_id=pad_token_id(model.tokenizer))
            assert model.generate(batch, max_new_tokens=6) == model.decode(whole[:, batch.mask.shape[1] :])

    def test_logits_of_a_prompt_with_a_forced_answer_are_its_own(self, vlm, basis):
        batch = vlm.batch(WORDS, GREY)
        kept = vlm.prefill(batch).answering(batch.inputs["input_ids"][:, -4:])
        interventions = [iv.amplify(basis, 2.0).at(layers=[layer]) for layer in (2, 5, 7)]
        expected = vlm.run(batch, interventions, layout="tile").logits
        for layout in ("tile", "branch", "fork"):
            close(vlm.run(kept, interventions, layout=layout).logits, expected)

    def test_images_in_some_prompts_only_are_computed(self):
        model, size = fresh("Qwen2.5-VL"), BY_NAME["Qwen2.5-VL"].images[0]
        shown = [Query(f"how to mend the hat {row} ?", id=f"t{row}") for row in range(12)]
        shown += [Query(f"mend hat {row} ?", id=f"i{row}", images=(picture(1, size),)) for row in range(8)]
        alone = torch.cat([model.run(model.batch([query], Mixed()), read=[Site()]).reads[Site()][0] for query in shown])
        close(gl.collect(model, shown, Mixed()).states, alone, 1e-4)

    def test_prompts_padded_on_the_right_are_not_kept(self, vlm, basis):
        left, right = (vlm.batch(WORDS, GREY, padding_side=side) for side in ("left", "right"))
        close(vlm.prefill(left).logits, vlm.run(left).logits[0])
        kept = vlm.prefill(right)
        assert (kept.flaw, kept.cache) == ("the batch is padded on the right", None)
        close(kept.logits, vlm.run(left).logits[0])
        assert vlm.run(kept, [iv.nothing, iv.amplify(basis)]).layout == "tile" and not vlm.prefill(left).flaw

    @pytest.mark.parametrize("rope", ["dynamic", "default"])
    def test_answers_where_positions_depend_on_the_length_of_the_prompt(self, rope):
        config = LlamaConfig(**SMALL, max_position_embeddings=40, rope_parameters={"rope_theta": 1e4, "rope_type": rope, "factor": 4.0})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = gl.load(LlamaForCausalLM(config).eval(), processor=tokenizer(TEMPLATE))
        batch, interventions = model.batch(TEXTS), [iv.nothing, *interventions_of(model)[1:3]]
        kept = model.prefill(batch).answering(batch.inputs["input_ids"][:, :1].expand(-1, 60))
        mine, tiles = model.run(kept, interventions, logits="answer"), model.run(kept, interventions, logits="answer", layout="tile")
        assert mine.layout == ("tile" if rope == "dynamic" else "branch")
        close(mine.logits, tiles.logits)

    def test_forks_refuse_what_they_cant_do(self, vlm, basis):
        batch = vlm.batch(WORDS, GREY)
        intervention = iv.amplify(basis).at(positions="all")
        embedding = iv.custom(lambda states, context: states + 1).at(hook="embed", positions="all")
        everywhere = [embedding, *(intervention.at(layers=[layer]) for layer in (6, 7))]
        for interventions, options in ((everywhere, {}), ([intervention] * 2, {"logits": "all"})):
            with pytest.raises(errors.InterventionError, match="Interventions can't run as forks"):
                vlm.run(batch, interventions, layout="fork", **options)
        run = vlm.run(batch, everywhere)
        assert run.layout == "tile"
        close(run.logits, vlm.run(batch, everywhere, layout="tile").logits)

    def test_a_prefix_of_other_weights_is_refused(self, vlm, processor, eager_to_share):
        other = copy.deepcopy(vlm.hf)
        with torch.no_grad():
            other.lm_head.weight.add_(1)
        batch = vlm.batch(WORDS, GREY)
        with pytest.raises(errors.MismatchError, match="a prefix of"):
            gl.load(other, processor=processor).run(batch.after(vlm.share(batch)))

    def test_forks_of_a_model_whose_last_blocks_share_keys_are_refused(self):
        from tests.zoo.gemma import gemma4, gemma4_processor

        kinds = ["sliding_attention", "full_attention"] * 4
        model = gl.load(gemma4(num_hidden_layers=8, layer_types=kinds, num_kv_shared_layers=2), processor=gemma4_processor())
        batch, push = batch_of(BY_NAME["Gemma 4"], model), pushing(a_push(model)).at(positions="all")
        run = model.run(batch, [push.at(layers=[layer]) for layer in range(8)])
        assert run.layout == "tile" and "KeyError" in model._tests.flaws["forks", True]

    def test_forks_over_blocks_that_run_only_beside_an_image(self):
        model = fresh("Llama 3.2 Vision")
        batch, push = model.batch(TEXTS), pushing(a_push(model)).at(positions="all")
        layers = [point.layer for point in model.cfg.computed(False) if point.hook == "attn_out"]
        interventions = [push.at(layers=[layer]) for layer in layers]
        close(model.run(batch, interventions, layout="fork").logits, model.run(batch, interventions, layout="tile").logits)

    def test_generation_with_a_cache_of_ones_own(self, vlm, basis):
        batch, options = vlm.batch(WORDS, GREY), {"cache_implementation": "static"}
        kept = vlm.prefill(batch)
        whole, mine = (vlm.run(prompts, iv.amplify(basis), new_tokens=4, generation=options).tokens for prompts in (batch, kept))
        assert torch.equal(whole, mine)

    @pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
    def test_copies_are_halved_with_the_batch(self, vlm, basis, monkeypatch):
        decoder, rows = vlm.hf.get_submodule(vlm.cfg.decoder), []

        def cramped(module, args, kwargs):
            rows.append(len(kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]))
            if rows[-1] > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")

        intervention, options = iv.amplify(basis).at(positions="all"), {"layers": [0], "placebos": 0, "scores": [kl]}
        expected = gl.sweep(vlm, intervention, WORDS, GREY, strengths=[0.1 * step for step in range(1, 20)], **options).columns["value"]
        handle = decoder.register_forward_pre_hook(cramped, with_kwargs=True)
        try:
            found = gl.sweep(vlm, intervention, WORDS, GREY, strengths=[0.1 * step for step in range(1, 20)], **options).columns["value"]
        finally:
            handle.remove()
        assert max(rows) == 16 and max(rows[2:]) <= 9
        assert abs(found - expected).max() < 1e-4

    def test_no_memory_is_no_flaw(self, vlm, monkeypatch):
        def full(*rest, **options):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setitem(vlm.__dict__, "_tests", SelfTests(vlm._engine))
        monkeypatch.setattr(scheduler, "cache_prompts", full)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            vlm.prefill(vlm.batch(WORDS, GREY))
        assert not vlm._tests.flaws

    def test_prompts_of_one_token(self, vlm):
        batch = vlm.batch("how")
        short = replace(
            batch,
            inputs={name: value[:, -1:] for name, value in batch.inputs.items()},
            **{name: getattr(batch, name)[:, -1:] for name in ("mask", "image", "instruction")},
        )
        run = vlm.run(short, [iv.nothing, iv.nothing])
        assert run.why == "from the positions 'last' on, it is most of the prompts"
        close(run.logits, vlm.run(short, [iv.nothing, iv.nothing], layout="tile").logits)

    def test_pictures_of_their_own_leave_prefixes_of_common_ones_alone(self, eager_to_share):
        model, size = fresh("LLaVA-1.5"), BY_NAME["LLaVA-1.5"].images[0]
        own = [Query(text, images=(picture(row, size),)) for row, text in enumerate(TEXTS)]
        assert model.share(model.batch(own, presentations.own_images)) is None
        assert model.share(model.batch(TEXTS, presentations.blank("grey", size[0]))) is not None

    def test_a_row_holds_no_more_than_the_prefix_is_long(self, eager_to_share, monkeypatch):
        model = loaded("Llama")
        monkeypatch.setattr(limits, "PREFIX_ROW_TOKENS", 1)
        batch = model.batch([f"{text} {text}" for text in TEXTS] * 3)
        prefix = model.share(batch)
        cache = prefix.cache(batch)
        longest = int(batch.mask.sum(1).max()) - len(prefix)
        assert cache.row.bincount().max() == max(1, len(prefix) // longest)
        assert 1 < int(cache.row.max()) + 1 == len(cache.past.layers[0].keys)
        expected = model.run(batch, interventions_of(model), layout="tile").logits
        close(model.run(model.prefill(batch.after(prefix)), interventions_of(model)).logits, expected)

    def test_half_precision_answers_are_not_refused_for_a_tie(self):
        """Of a trained model; a random one may be all noise in half precision."""
        model = gl.load("organism")
        half = gl.load(copy.deepcopy(model.hf).to(torch.bfloat16), processor=model.processor)
        half.run(half.prefill(half.batch(WORDS, GREY)), new_tokens=3)
        assert half._tests.flaws["answers, padded", True] == ""


class TestWhatTheThirdReadersMissed:
    def test_gates_of_forks_have_a_verdict_for_each_lane(self, vlm, basis):
        batch = vlm.batch(WORDS, GREY)
        interventions = [iv.amplify(basis).when(gates.harmful(basis, bound)).at(layers=[6], positions="all") for bound in (-1e9, 1e9, -1e9)]
        forks, tiles = (vlm.run(batch, interventions, layout=layout) for layout in ("fork", "tile"))
        assert forks.decisions.keys() == tiles.decisions.keys() and len(tiles.decisions) == 3
        assert all(torch.equal(opened, tiles.decisions[key]) for key, opened in forks.decisions.items())
        close(forks.logits, tiles.logits)

    def test_a_fork_that_reads_before_its_edit_begins_there(self, vlm, basis):
        batch, site = vlm.batch(WORDS, GREY), Site(layers=(1,), positions="all")
        interventions = [iv.amplify(basis).at(layers=[layer], positions="all") for layer in (5, 6)]
        forks, tiles = (vlm.run(batch, interventions, read=[site], layout=layout) for layout in ("fork", "tile"))
        close(forks.reads[site], tiles.reads[site])

    def test_ends_that_reach_the_image_never_branch(self, vlm, basis):
        """Short as they are: a prompt of many words with its image at the end."""
        batch = vlm.batch(WORDS, GREY)
        late = torch.zeros_like(batch.image)
        late[:, -3] = True
        moved = replace(batch, image=late)
        interventions = [iv.amplify(basis).at(positions=(-3, None), layers=[layer]) for layer in (2, 3)]
        assert BRANCHES.unsuited(RunRequest(vlm.cfg, batch, interventions)) == ""
        assert BRANCHES.unsuited(RunRequest(vlm.cfg, moved, interventions)) == "the positions (-3, None) are edited or read"

    def test_a_prefix_never_ends_before_an_image_of_another_prompt(self, vlm, eager_to_share):
        batch = vlm.batch(WORDS, GREY)
        prefix = vlm.share(batch)
        later = batch.image.clone()
        later[1, -2] = True
        assert prefix.begins(batch) is not None and prefix.begins(replace(batch, image=later)) is None

    def test_an_error_of_ones_own_is_no_flaw(self, vlm, monkeypatch):
        def refused(*rest, **options):
            raise errors.SiteError("this", "that", "mend it")

        monkeypatch.setitem(vlm.__dict__, "_tests", SelfTests(vlm._engine))
        monkeypatch.setattr(scheduler, "check_unedited", refused)
        with pytest.raises(errors.SiteError):
            vlm.prefill(vlm.batch(WORDS, GREY))
        assert not vlm._tests.flaws

    def test_a_branch_that_leaks_into_the_next_is_found(self, vlm, monkeypatch):
        """A mask that lets branches see each other, which shows only beside an edited one."""
        monkeypatch.setitem(vlm.__dict__, "_tests", SelfTests(vlm._engine))
        real = branches._logits

        def leaking(engine, cache, interventions):
            found = real(engine, cache, interventions)
            return (
                found + 0.1 * found.abs().max() * torch.tensor([0.0, float(len(interventions) == 3), 0.0])[: len(interventions), None, None]
            )

        monkeypatch.setattr(branches, "_logits", leaking)
        assert vlm.prefill(vlm.batch(WORDS, GREY)).flaw == "an edited branch changes the one beside it"

    def test_a_row_of_branches_is_bounded(self, vlm, basis):
        kept = vlm.prefill(vlm.batch(WORDS, GREY))
        interventions = [iv.amplify(basis).at(layers=[0])] * 5000

        def sizes_of(lanes):
            request = RunRequest(vlm.cfg, kept.batch, lanes)
            return [part.lanes for part in scheduler.parts(vlm._tests, request, kept)]

        sizes = sizes_of(interventions)
        assert max(sizes) == limits.BRANCH_TOKENS_PER_ROW and sum(sizes) == 5000
        everywhere = [intervention.at(positions="all") for intervention in interventions[:9]]
        assert sizes_of(everywhere) == [limits.TILES_PER_FORWARD, limits.TILES_PER_FORWARD, 1]


class TestWhatIsTakenForSomethingElse:
    def test_a_presentation_beside_a_batch(self, vlm):
        batch, white = vlm.batch(WORDS, GREY), presentations.blank("white", 32)
        for call in (vlm.generate, vlm.run_with_cache, vlm.run_with_hooks):
            with pytest.raises(errors.MismatchError, match="a batch that shows 'blank grey', with the presentation 'blank white'"):
                call(batch, white)

    def test_no_interventions(self, vlm):
        with pytest.raises(errors.InterventionError, match="no interventions"):
            vlm.run(vlm.batch(WORDS), [])

    def test_a_layout_of_answers(self, vlm):
        with pytest.raises(errors.ArgumentError, match="the layout 'fork' of generated answers"):
            vlm.run(vlm.batch(WORDS), [iv.nothing] * 2, layout="fork", new_tokens=2)

    def test_scores_and_queries_that_a_table_would_take_for_one(self, vlm, basis):
        intervention, options = iv.amplify(basis), {"layers": 4, "placebos": 0}
        with pytest.raises(errors.ArgumentError, match="two scores of one name"):
            gl.sweep(vlm, intervention, WORDS, scores=[AnswerLogProb("sorry"), AnswerLogProb("sure")], **options)
        with pytest.raises(errors.QueryError, match="two queries with one id"):
            gl.sweep(vlm, intervention, [Query("how ?", id="a"), Query("why ?", id="a")], **options)
        with pytest.raises(errors.ArgumentError, match="0 layers"):
            gl.sweep(vlm, intervention, WORDS, layers=[])
        with pytest.raises(errors.ArgumentError, match="strength 0 is none"):
            gl.sweep(vlm, intervention, WORDS, strengths=[0.0])
        with pytest.raises(errors.ArgumentError, match="several interventions"):
            gl.sweep(vlm, {"a": intervention, "b": intervention}, gl.organism.queries("test")[:4], **options).best()

    def test_answers_behind_kept_prompts_by_generate(self, vlm, basis):
        batch, intervention = vlm.batch(WORDS, GREY), iv.amplify(basis, 3.0)
        assert vlm.generate(vlm.prefill(batch), intervention=intervention, max_new_tokens=4) == vlm.generate(
            batch, intervention=intervention, max_new_tokens=4
        )
        kept = vlm.run(vlm.prefill(batch), [intervention, intervention], new_tokens=2)
        assert (kept.layout, kept.why) == ("branch", "")
        assert all(len(repr(value)) < 200 for value in (batch, vlm.prefill(batch), kept, vlm.run(batch)))
