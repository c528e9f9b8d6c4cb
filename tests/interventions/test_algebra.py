"""The algebra on models: random interventions against raw torch hooks that know nothing of guardlens, and its laws, in every layout."""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import guardlens as gl
from guardlens import errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.directions import Directions
from guardlens.hooks import Site
from guardlens.interventions import Intervention, Step
from guardlens.models.engine.batch import Batch
from tests import reference
from tests.strategies import gaussian

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
HOOKS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
NEW = 3


@dataclass(frozen=True)
class Drawn:
    """A step as numbers, of which a step of guardlens and one of the hooks are made.

    `held` and `seen` (of the gate) are `"twin"`, `"own"` or the number of a layer; `window` says which tokens of the own prompt are held.
    """

    kind: str
    hook: str
    layers: tuple[int, ...]
    positions: str | tuple[int | None, int | None] = "last"
    phase: str = "prefill"
    strength: float = 1.0
    number: float = 1.0
    held: str | int = "twin"
    window: str = "last"
    seen: str | int | None = None
    threshold: float = 0.0
    turned: bool = False

    def state(self, held):
        return iv.text_twin if held == "twin" else iv.State(layer=None if held == "own" else held, positions=self.window)

    def intervention(self, V, M):
        """The step in guardlens."""
        one, r, a = V.truncate(1), self.state(self.held), self.number
        intervention = {
            "project_out": lambda: iv.project_out(V),
            "amplify": lambda: iv.amplify(V, a),
            "patch": lambda: iv.patch(V, r),
            "replace": lambda: iv.replace(V, r, a),
            "add_component": lambda: iv.add_component(V, r, a),
            "patch a mean": lambda: iv.patch(V, V.harmless_mean),
            "add": lambda: iv.add(one, 4 * a),
            "add_relative": lambda: iv.add_relative(one, a),
            "linear": lambda: iv.linear(M, a),
            "swap": lambda: iv.swap(r),
            "custom": lambda: iv.custom(lambda h, context: h.tanh() + a * context.held(r), (r,)),
        }[self.kind]()
        intervention = (
            intervention.at(hook=self.hook, layers=self.layers, positions=self.positions).during(self.phase).scaled(self.strength)
        )
        gate = None if self.seen is None else gates.harmful(V, self.threshold, self.state(self.seen))
        return intervention if gate is None else intervention.when(~gate if self.turned else gate)

    def map(self, V, M, layer, h, r):
        """The same as a formula."""
        v, a, mean = V.vectors[layer], self.number, V.harmless_mean[layer]
        P = v.T @ v
        return {
            "project_out": lambda: h - h @ P,
            "amplify": lambda: h + a * h @ P,
            "patch": lambda: h + (r - h) @ P,
            "replace": lambda: h - h @ P + a * r @ P,
            "add_component": lambda: h + a * r @ P,
            "patch a mean": lambda: h + (mean - h) @ P,
            "add": lambda: h + 4 * a * v[0],
            "add_relative": lambda: h + a * h.norm(dim=-1, keepdim=True) * v[0],
            "linear": lambda: h + a * h @ M,
            "swap": lambda: r,
            "custom": lambda: h.tanh() + a * r,
        }[self.kind]()


class Hooked:
    """An intervention as torch hooks on prompts with answers behind them (maybe of no token). Prompts are padded on the left."""

    def __init__(self, hf, steps, V, M, prompt, image, twin):
        self.hf, self.steps, self.V, self.M, self.prompt, self.image, self.twin = hf, steps, V, M, prompt, image, twin
        self.final = {}

    def logits(self, inputs):
        with ExitStack() as stack, torch.no_grad():
            for layer, block in enumerate(reference.blocks(self.hf)):
                into = lambda m, args, kwargs, i=layer: ((self.at("resid_pre", i, args[0]), *args[1:]), kwargs)  # noqa: E731
                stack.callback(block.register_forward_pre_hook(into, with_kwargs=True).remove)
                attention = lambda m, args, out, i=layer: (self.at("attn_out", i, out[0]), *out[1:])  # noqa: E731
                stack.callback(block.self_attn.register_forward_hook(attention).remove)
                for name, module in (("mlp_out", block.mlp), ("resid_post", block)):
                    hook = lambda m, args, out, name=name, i=layer: self.at(name, i, out)  # noqa: E731
                    stack.callback(module.register_forward_hook(hook).remove)
            return self.hf(**inputs, use_cache=False).logits

    def at(self, hook, layer, value):
        for step in self.steps:
            if step.hook == hook and layer in step.layers:
                r = self.held(step, step.held, hook, layer, value)
                edited = self.map(step, layer, value, r)
                chosen = self.chosen(step, value.shape[1])
                if step.seen is not None:
                    at = step.seen if isinstance(step.seen, int) else layer
                    along = self.held(step, step.seen, "resid_post", layer, value if hook == "resid_post" else None) @ self.V.vectors[at, 0]
                    chosen = chosen & ((along > step.threshold) != step.turned)[:, None]
                value = torch.where(chosen[..., None], value + step.strength * (edited - value), value)
        self.final[hook, layer] = value
        return value

    def map(self, step, layer, value, r):
        return step.map(self.V, self.M, layer, value, r[:, None].expand_as(value))

    def held(self, step, held, hook, layer, now):
        """One vector per prompt: of the twin, of this very place just before this step, or of an earlier one after all its steps."""
        if held == "twin":
            return self.twin[hook, layer][:, -1]
        place = (hook, layer if held == "own" else held)
        value = now if place == (hook, layer) and now is not None else self.final[place]
        value = value[:, : self.prompt.shape[1]]
        if step.window == "last":
            return value[:, -1]
        return (value * self.prompt[..., None]).sum(1) / self.prompt.sum(1, keepdim=True)

    def chosen(self, step, width):
        rows, length = self.prompt.shape
        chosen = torch.zeros(rows, width, dtype=torch.bool)
        if step.phase != "decode":
            chosen[:, :length] = self.of_prompt(step.positions)
        if step.phase != "prefill":
            chosen[:, length:] = True
        return chosen

    def of_prompt(self, positions):
        if positions in ("all", "image"):
            return self.prompt if positions == "all" else self.image
        chosen = torch.zeros_like(self.prompt)
        for row, real in enumerate(self.prompt):
            places = real.nonzero().flatten()
            chosen[row, places[-1:] if positions == "last" else places[slice(*positions)]] = True
        return chosen


@dataclass(frozen=True)
class Setting:
    """A model, prompts of it, and what interventions are made of."""

    model: gl.HookedModel
    batch: Batch
    V: Directions
    M: torch.Tensor
    twin: dict

    def raw(self, steps, tokens=None):
        """Logits of the hooked model: at the prompts' last token, or before each token of the answers."""
        batch, inputs = self.batch, {name: value for name, value in self.batch.inputs.items() if name != "position_ids"}
        hooked = Hooked(self.model.hf, steps, self.V, self.M, batch.mask, batch.image, self.twin)
        if tokens is None:
            return hooked.logits(inputs)[:, -1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
        return hooked.logits(inputs)[:, batch.mask.shape[1] - 1 : -1]

    def fit(self, steps):
        """The drawn steps at layers and positions that this model has."""
        last, image = self.model.cfg.n_layers - 1, bool(self.batch.image.any())
        placed = (replace(step, layers=tuple(layer % (last + 1) for layer in step.layers)) for step in steps)
        return [step if image or step.positions != "image" else replace(step, positions="all") for step in placed]

    def intervention(self, steps):
        intervention = iv.nothing
        for step in steps:
            intervention = intervention >> step.intervention(self.V, self.M)
        return intervention


@pytest.fixture(scope="module", params=["vlm", "llm"])
def setting(request, basis):
    model = request.getfixturevalue(request.param)
    shown = GREY if request.param == "vlm" else text_only
    layers, width = model.cfg.n_layers, model.cfg.d_model
    V = basis
    if request.param == "llm":
        vectors = torch.linalg.qr(gaussian(3, layers, width, 2, dtype=torch.float32)).Q.transpose(1, 2).contiguous()
        means = gaussian(4, 2, layers, width, dtype=torch.float32)
        V = Directions(vectors, tuple(range(layers)), means[0], means[1], torch.zeros(layers, 0), "test", provenance=model.provenance)
    text = model.batch(TEXTS, text_only)
    alone = Hooked(model.hf, (), V, None, text.mask, text.image, {})
    alone.logits(text.inputs)
    return Setting(model, model.batch(TEXTS, shown), V, gaussian(5, width, width, dtype=torch.float32) / width**0.5, alone.final)


@st.composite
def steps(draw):
    """A step at places of which several steps like to share one. Layer -1 is the model's last."""
    hook = draw(st.sampled_from([*HOOKS, *["resid_post"] * 4]))
    layers = draw(st.sampled_from([(1,), (2,), (1, 2), (1, -1)]))
    first = layers[0]
    return Drawn(
        draw(st.sampled_from(KINDS)),
        hook,
        layers,
        draw(st.sampled_from(["last", "last", "last", "all", "image", (-2, None), (2, 5)])),
        draw(st.sampled_from(["prefill", "prefill", "decode", "always"])),
        draw(st.sampled_from([1.0, 1.0, 0.5, -0.5])),
        draw(st.sampled_from([-1.0, 0.4, 1.0, 1.5])),
        draw(st.sampled_from(["twin", "own", "own", first, first - 1])),
        draw(st.sampled_from(["last", "last", "all"])),
        draw(st.sampled_from([None, None, "twin", first - 1, *(["own"] if hook == "resid_post" else [])])),
        draw(st.sampled_from([0.25, 0.5, -0.5])),  # never 0: project_out puts states there, and rounding would decide
        draw(st.booleans()),
    )


KINDS = ("project_out", "amplify", "patch", "replace", "add_component", "patch a mean", "add", "add_relative", "linear", "swap", "custom")


def close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


@settings(max_examples=8, phases=[Phase.generate])
@given(st.lists(st.lists(steps(), min_size=2, max_size=4), min_size=2, max_size=2))
def test_random_interventions_are_those_of_raw_hooks_in_every_layout(setting, drawn):
    model, batch, drawn = setting.model, setting.batch, [setting.fit(each) for each in drawn]
    interventions, expected = [setting.intervention(each) for each in drawn], torch.stack([setting.raw(each) for each in drawn])
    kept = model.prefill(batch)
    close(model.run(batch, interventions[0]).logits[0], expected[0])
    for prompts in (batch, kept):
        for layout in ("auto", "tile", "fork"):
            try:
                run = model.run(prompts, interventions, layout=layout)
            except errors.InterventionError as refused:
                assert layout == "fork" and "can't run as forks" in str(refused)
                continue
            close(run.logits, expected)
    with gl.attach(interventions[0], model.hf, model.processor):
        close(model.hf(**batch.inputs).logits[:, -1], expected[0])
    tokens = torch.randint(5, 60, (len(TEXTS), NEW), generator=torch.Generator().manual_seed(1))
    forced = model.run(kept.answering(tokens), interventions, logits="answer")
    close(forced.logits, torch.stack([setting.raw(each, tokens) for each in drawn]))


@settings(max_examples=3, phases=[Phase.generate])
@given(st.lists(steps(), min_size=2, max_size=4))
def test_answers_under_random_interventions_are_those_of_raw_hooks(setting, drawn):
    """Each token is the likeliest one after those before it, up to rounding."""
    model, batch, drawn = setting.model, setting.batch, setting.fit(drawn)
    intervention = setting.intervention(drawn)
    with gl.attach(intervention, model.hf, model.processor):
        attached = model.hf.generate(**batch.inputs, max_new_tokens=NEW, do_sample=False)[:, batch.mask.shape[1] :]
    for run in (
        model.run(batch, intervention, new_tokens=NEW),
        model.run(model.prefill(batch), [intervention, intervention], new_tokens=NEW),
    ):
        for tokens in run.tokens:
            assert torch.equal(tokens, attached)
    real = (attached == model.hf.generation_config.eos_token_id).cumsum(1).roll(1, 1).index_fill(1, torch.tensor([0]), 0) == 0
    logits = setting.raw(drawn, attached)
    given_up = logits.amax(-1) - logits.gather(2, attached[..., None])[..., 0]
    assert (given_up[real] <= 1e-4 * logits.abs().max()).all()


def laws(V, M):
    """Pairs of interventions that are one, by name."""
    one, r = V.truncate(1), V.harmless_mean[1]
    out, same, push = iv.project_out(V), iv.swap(iv.own_state), iv.linear(M, 0.5)
    flipped = replace(V, vectors=-V.vectors)
    opened, closed = gates.harmful(V, -1e9), gates.harmful(V, 1e9)

    def folded(*interventions):
        edit = interventions[0].steps[0].edit
        for intervention in interventions[1:]:
            edit = edit.then(intervention.steps[0].edit)
        return Intervention((Step(edit),))

    return {
        "project_out is idempotent": (out >> out, out),
        "amplify by -1 projects out": (iv.amplify(V, -1.0), out),
        "patch is replace with gain 1": (iv.replace(V, iv.text_twin, 1.0), iv.patch(V, iv.text_twin)),
        "replace with gain 0 projects out": (iv.replace(V, iv.text_twin, 0.0), out),
        "patch is idempotent": (iv.patch(V, r) >> iv.patch(V, r), iv.patch(V, r)),
        "swap with own is the identity": (same, iv.nothing),
        "patch with own is the identity": (iv.patch(V, iv.own_state), iv.nothing),
        "so it is between steps": (push >> same >> out >> same >> push, push >> out >> push),
        "and patch, too": (iv.patch(V, iv.own_state) >> push >> iv.patch(V, iv.own_state) >> out, push >> out),
        "and under a gate of its own": (push >> same.when(gates.harmful(V, 0.0, iv.own_state)) >> out, push >> out),
        "a chain is its folded map": (out >> push >> iv.add(one, 3.0), folded(out, push, iv.add(one, 3.0))),
        "a chain of held states, too": (iv.patch(V, iv.text_twin) >> push, folded(iv.patch(V, iv.text_twin), push)),
        "associative": ((out >> push) >> iv.add(one), out >> (push >> iv.add(one))),
        "nothing is neutral": (iv.nothing >> push, push >> iv.nothing),
        "strengths multiply": (push.scaled(0.5).scaled(3.0), push.scaled(1.5)),
        "strength is a share of the way": (push.scaled(0.5), iv.linear(M, 0.25)),
        "strength 0": (push.scaled(0.0), iv.nothing),
        "a closed gate": (push.when(closed), iv.nothing),
        "an open gate": (push.when(opened), push),
        "not": (push.when(~opened), iv.nothing),
        "and": (push.when(opened & closed), iv.nothing),
        "or": (push.when(closed | opened), push),
        "signs of project_out": (iv.project_out(flipped), out),
        "signs of amplify": (iv.amplify(flipped, 2.0), iv.amplify(V, 2.0)),
        "signs of patch": (iv.patch(flipped, iv.text_twin), iv.patch(V, iv.text_twin)),
        "signs of replace": (iv.replace(flipped, r, 3.0), iv.replace(V, r, 3.0)),
        "the prefill and the decode steps are always": (push.during("prefill") >> push.during("decode"), push.during("always")),
        "disjoint layers commute": (push.at(layers=[1]) >> out.at(layers=[2]), out.at(layers=[2]) >> push.at(layers=[1])),
        "disjoint hooks commute": (push.at(hook="attn_out") >> out.at(hook="mlp_out"), out.at(hook="mlp_out") >> push.at(hook="attn_out")),
        "disjoint positions commute": (push.at(positions=(-2, -1)) >> out, out >> push.at(positions=(-2, -1))),
    }


EXACT = ("strength 0", "a closed gate", "not", "and", "an open gate", "or", "nothing is neutral", "associative")


@pytest.mark.parametrize("layout", ["tile", "branch", "late", "fork", "kept", "answering", "attached"])
def test_laws_hold_in_every_layout(setting, layout):
    model, batch = setting.model, setting.batch
    pairs = {name: [each if each.steps and each.steps[0].site.layers else each.at(layers=[1]) for each in pair]
             for name, pair in laws(setting.V, setting.M).items()}  # fmt: skip
    ones, others = ([pair[i] for pair in pairs.values()] for i in (0, 1))  # in the same lanes of two runs: rounding depends on the lane
    kept, tokens = model.prefill(batch), torch.arange(5, 5 + NEW).expand(len(TEXTS), NEW)
    # Branches that begin late lie in the order in which they begin, and so round otherwise; after a read of layer 0 none of them does.
    read = [] if layout == "late" else [Site(layers=(0,))]
    exact = 1e-5 if layout == "late" else 0

    def run(interventions):
        if layout == "attached":
            return [attached(setting, intervention) for intervention in interventions]
        if layout == "answering":
            return model.run(kept.answering(tokens), interventions, logits="answer", read=read).logits
        prompts, asked = (kept, "auto") if layout in ("kept", "late") else (batch, layout)
        found = model.run(prompts, interventions, read=read, layout=asked)
        assert found.layout == ("branch" if layout in ("kept", "late") else layout)
        return found.logits

    found, again = run(ones), run(others)
    plain = again[list(pairs).index("strength 0")]
    apart = {name: float((one - other).abs().max()) for name, one, other in zip(pairs, found, again, strict=True)}
    assert not {name: by for name, by in apart.items() if by > (exact if name in EXACT else 1e-4 * float(plain.abs().max()))}
    assert sum(not torch.allclose(each, plain, atol=1e-3) for each in found) > len(found) / 2


def attached(setting, intervention):
    with gl.attach(intervention, setting.model.hf, setting.model.processor), torch.no_grad():
        return setting.model.hf(**setting.batch.inputs).logits[:, -1]


@pytest.mark.parametrize("positions", ["last", "all", (2, 5)])
def test_a_vector_is_added_once_per_token(setting, positions):
    """In the prefill at the positions, and at each new token once, whatever the positions say; attached, too."""
    model, batch, vector, before, after = setting.model, setting.batch, 2.0 * setting.V.vectors[1, 0], [], []
    intervention = iv.add(setting.V.truncate(1), 2.0).at(layers=[1], positions=positions).during("always")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    blocks = reference.blocks(model.hf)
    with ExitStack() as stack:
        stack.callback(blocks[1].register_forward_hook(lambda module, args, out: before.append(out.clone())).remove)
        stack.enter_context(gl.attach(intervention, model.hf, model.processor))
        stack.callback(blocks[2].register_forward_pre_hook(lambda module, args: after.append(args[0].clone())).remove)
        tokens = model.hf.generate(**batch.inputs, **options)[:, batch.mask.shape[1] :]
    hooked = Hooked(model.hf, (), setting.V, None, batch.mask, batch.image, {})
    for step, (raw, new) in enumerate(zip(before, after, strict=True)):
        expected = hooked.of_prompt(positions)[..., None] * vector if step == 0 else vector.expand_as(raw)
        torch.testing.assert_close(new - raw, expected, atol=1e-5, rtol=0)
    assert len(before) == NEW
    assert torch.equal(model.run(batch, intervention, new_tokens=NEW, generation={"min_new_tokens": NEW}).tokens[0], tokens)
