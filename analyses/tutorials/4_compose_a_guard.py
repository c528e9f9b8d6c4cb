# %% [markdown]
# # Compose your own guard
#
# A guard is like a sentence: *what* to change, *where*, *for which requests*, *when* and *how strongly*. Each word is a part of guardlens
# that can be swapped by itself. We build a guard word by word, measure what each contributes, and take it out of the lab into plain Hugging
# Face code.
#
# ![Attack success and over-refusal of each step of the guard, beside two images](4_compose_a_guard/end.png)
#
# You need guardlens, installed as in [tutorial 1](1_modality_gap.md). The cells take half a minute on the organism, on CPU.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch

import guardlens as gl
from guardlens import directions, gates, presentations
from guardlens import interventions as iv

gl.progress_bars(False)
model, grey = gl.load("organism"), presentations.blank("grey")
queries = gl.organism.queries("validation")
ssd = directions.ssd(gl.collect(model.llm, gl.organism.pairs()))

# %% [markdown]
# One function measures every step: it judges answers beside the grey image. ASR is the share of harmful requests that are answered,
# over-refusal is the share of harmless ones that are refused, and helpful is the share of harmless ones that are answered correctly.


# %%
def measure(**interventions):
    table = gl.evaluate(model, interventions, queries, grey, judge=gl.organism.judge, max_new_tokens=10, batch_size=256)
    return pd.DataFrame(
        {rate: {name: str(table.rate(rate, name, grey.name)) for name in interventions} for rate in ("asr", "over_refusal", "helpful")}
    )


measure(nothing=iv.nothing)

# %% [markdown]
# ## What: an edit, and where: `.at`
#
# The simplest edit adds the safety direction, times a length. `.at` puts it at a layer; the prompt's last token is the default position. A
# length of 40 is about the distance between the classes at layer 5.

# %%
push = iv.add(ssd, 40.0).at(layers=5)
print(push)
measure(push=push)

# %% [markdown]
# No harmful request is answered, but more than half of the harmless ones are refused. An ASR alone would have called this guard perfect.
#
# ## For which requests: a gate
#
# A gate decides once per query. `gates.harmful` opens if a state lies on the harmful side of the direction. *Which* state it looks at makes
# the difference: the request's text twin (the same prompt without its image), or the state of the run itself (`iv.own_state`), which the
# image has shifted.

# %%
twin_says, own_says = gates.harmful(ssd), gates.harmful(ssd, state=iv.own_state)
measure(by_the_twin=push.when(twin_says), by_its_own_state=push.when(own_says))

# %% [markdown]
# The gate on the twin keeps the effect at nearly no cost. The gate on the run's own state costs little, too, but it misses the requests
# that the image has moved past the threshold, which are the ones that matter. Gates combine with `&`, `|` and `~`. This one opens only
# where the two disagree, that is, where the image hides harm:

# %%
hidden = push.when(twin_says & ~own_says)
batch = model.batch(queries, grey)
harmful = torch.tensor([query.label == "harmful" for query in queries])
for name, intervention in {"twin": push.when(twin_says), "twin and not own": hidden}.items():
    (opened,) = model.run(batch, intervention).decisions.values()
    print(
        f"{name:17} opens for {opened[harmful].float().mean():.0%} of harmful, {opened[~harmful].float().mean():.0%} of harmless requests"
    )
measure(hidden=hidden)

# %% [markdown]
# This guard edits a third of the harmful requests and removes most of the attack success. (The requests that are still answered lie just
# above the threshold.)
#
# ## How far: states instead of numbers
#
# We chose the length of 40 by hand. A *held state* is a better guide: move each request to where its own text twin lies. `iv.patch` sets
# the component along the direction to that of a reference, which is a state, or a constant such as the mean of the harmful class.

# %%
patch = iv.patch(ssd, iv.text_twin).at(layers=5)
mean = iv.patch(ssd, ssd.harmful_mean).at(layers=5)
measure(patch_to_twin=patch, patch_to_mean=mean, patch_to_mean_gated=mean.when(twin_says))

# %% [markdown]
# A patch to the twin gives a request back what the image took and no more, and that is safe for harmless requests even without a gate. A
# patch to the harmful mean makes every request look harmful, and only the gate saves the harmless ones.
#
# ## How strongly: `.scaled`
#
# Strength s means h + s (edit(h) − h) for every edit. Strength 0 leaves every state as it was, bit for bit.

# %%
site = gl.Site("resid_post")
few = model.batch(queries[68:76], grey)


def states(intervention):
    return model.run(few, intervention, read=[site]).reads[site][0]


print(
    "strength 0 is no edit:", torch.equal(states(iv.nothing), states(patch.scaled(0.0))), "over states of shape", tuple(states(patch).shape)
)
measure(half=patch.scaled(0.5), whole=patch, double=patch.scaled(2.0))

# %% [markdown]
# With more strength, fewer harmful requests are answered; beyond 1 the patch overshoots the twin, and harmless requests begin to be
# refused.
#
# ## When: `.during`
#
# The default is the *prefill*, which edits the prompt once. `"decode"` edits each new token, and `"always"` does both. When does the model
# decide whether to refuse?

# %%
guarded = patch.when(twin_says)
phases = {"no edit": iv.nothing, **{phase: guarded.during(phase) for phase in ("prefill", "decode", "always")}}
for query in (queries[0], queries[2]):
    print(query.text)
    for phase, intervention in phases.items():
        print(f"   {phase:8}", model.generate(query, grey, intervention, max_new_tokens=10))

# %% [markdown]
# The first request is refused anyway, and the second is answered without an edit. These are the rates over all requests:

# %%
measure(**phases)

# %% [markdown]
# An edit in the decode steps alone comes too late, because the first word settles the matter. And the guard brings back the decision, but
# not the words. Beside the grey image the organism's refusals lose words, with and without an edit, and editing each new token makes the
# words no better.
#
# ## One after the other: `>>`
#
# `a >> b` applies first a, then b. Order matters only if they edit the same place.


# %%
def difference(one, other):
    return f"{float((states(one) - states(other)).abs().max()):.1e}"


out = iv.project_out(ssd)
print("same layer: ", difference((push >> out.at(layers=5)), (out.at(layers=5) >> push)))
print("two layers: ", difference((push >> out.at(layers=3)), (out.at(layers=3) >> push)))

# %% [markdown]
# Now we compose a guard of our own. At layer 5 it gives each request whose twin looks harmful the twin's component back. At layer 7 it adds
# a push, but only for requests whose twin is harmful *and* whose run still looks harmless there. Each step has its own gate, and the
# intervention prints all of it.

# %%
still_hidden = gates.harmful(ssd) & ~gates.harmful(ssd, state=iv.own_state)
mine = guarded >> iv.add(ssd, 20.0).at(layers=7).when(still_hidden)
print(mine)
measure(patch_alone=guarded, mine=mine)

# %% [markdown]
# ## A word of your own: `custom`
#
# Any function of the states can be an edit. This one has a soft gate: the more harmful the twin looks, the further it moves a request
# towards its twin. `requires` names the state that it needs.


# %%
def softly(states, context):
    direction, threshold = ssd.at(context.layer)[0].to(states), float(ssd.midpoints[context.layer])
    twin = context.held(iv.text_twin) @ direction
    return states + (torch.sigmoid((twin - threshold) / 5) * (twin - states @ direction))[:, None] * direction


measure(soft=iv.custom(softly, requires=(iv.text_twin,)).at(layers=5))

# %% [markdown]
# It does about the same as the hard gate. A custom edit sees exactly the states of its site, never padding, and everything else composes
# with it. It can't be saved, because a function is not data.
#
# ## Out of the lab
#
# An intervention is data: it is saved in one file, and the loaded one has the same fingerprint. `gl.attach` puts it on the Hugging Face
# model as plain torch hooks, for any code that calls `generate`.

# %%
file = Path(tempfile.mkdtemp()) / "guard.safetensors"
mine.save(file)
loaded = gl.Intervention.load(file)
print("same fingerprint:", loaded.fingerprint == mine.fingerprint, f"({file.stat().st_size / 1024:.0f} KiB)")

# %%
inputs = few.inputs
with gl.attach(loaded, model.hf, model.processor) as handle:
    tokens = model.hf.generate(**inputs, max_new_tokens=10)
    print("gate of the first step:", next(iter(handle.decisions.values())).tolist())
outside = model.decode(tokens[:, inputs["input_ids"].shape[1] :])
print("the same answers as in the lab:", outside == model.generate(few, intervention=mine, max_new_tokens=10))

# %% [markdown]
# After the `with` block, the model is as it was. (Saved directions belong to the model that made them; another model refuses the file.)
#
# ## All steps side by side
#
# The white image had no part in anything above. Two placebo draws turn every push of our guard into random directions of the same norm.

# %%
steps = {
    "none": iv.nothing,
    "push": push,
    "push, gated": push.when(twin_says),
    "patch, gated": guarded,
    "mine": mine,
    "placebo of mine": [mine.placebo(0), mine.placebo(1)],
}
white = presentations.blank("white")
table = gl.evaluate(model, steps, queries, [grey, white], judge=gl.organism.judge, max_new_tokens=10, batch_size=256)
axes = table.plot()

# %%
pd.DataFrame({way.name: {name: str(table.rate("asr", name, way.name)) for name in steps} for way in (grey, white)})

# %% [markdown]
# The gate makes a push usable, the twin sets its length, and the placebo shows that the direction matters: the same norm in other
# directions doesn't bring refusals back.
#
# ## What this can't tell
#
# The guard was built and measured on one validation split, by looking at it again and again: these numbers are for building, not for
# claims. [Tutorial 6](6_evaluate_defences.md) shows how to support a claim. The twin has no image, so harm that only the image carries
# passes every gate here. And an attacker who knows the threshold can write a request that stays below it.
#
# ## Try next
#
# *Do you want a gate at a false-positive rate of your choice?*
#
# ```python
# fit = gl.collect(model.llm, gl.organism.pairs())
# strict = gates.harmful(ssd, gates.threshold_at_fpr(ssd, fit, 0.01))
# measure(strict=patch.when(strict))
# ```
#
# *Does the edit have to be at the last token?* `push.at(positions="instruction")` moves it to the tokens of the request, `"image"` to the
# image tokens, and `"all"` to all tokens.
#
# *Would another component do?* `push.at(hook="mlp_out")` edits what the MLP writes instead of the whole residual stream.
#
# More: [the algebra and its laws](../explanation/interventions.md), [interventions](../api/interventions.md), [add a
# defence](../how-to/defence.md), [export a guard](../how-to/export.md).
