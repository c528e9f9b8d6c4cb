# %% [markdown]
# # Sweep the layers
#
# At which layer does an edit bring refusals back, how strong must it be, and what does it do to harmless requests? A sweep asks all
# layers and strengths at once, with a placebo beside every cell, and costs little more than looking once. We sweep VLM-Guard's edit,
# choose a layer, ask how sure that choice is, and keep the prompts for the next question.
#
# ![Change of the refusal log-odds by layer and strength: the guard and its placebo, harmful and harmless requests](3_layer_sweep/end.png)
#
# You need: guardlens, installed as in [tutorial 1](1_modality_gap.md). It takes: half a minute (on the organism, CPU).

# %%
import time

import pandas as pd

import guardlens as gl
from guardlens import defences, directions, gates, plots, presentations, scores
from guardlens import interventions as iv
from guardlens.results import intervals

gl.progress_bars(False)
model, grey = gl.load("organism"), presentations.blank("grey")
ssd = directions.ssd(gl.collect(model.llm, gl.organism.pairs()))

# %% [markdown]
# ## An intervention that can move
#
# An intervention says what to change. This one is VLM-Guard's `replace`: at the prompt's last token, the component along the safety
# direction becomes that of the *text twin*, the same request as the LLM sees it, if that looks harmful. It names no layer, so it is *free*:
# a sweep may move it.

# %%
guard = defences.vlm_guard(ssd).intervention
print(guard)
print("free:", guard.free)

# %% [markdown]
# ## One sweep
#
# We ask the validation split, beside a grey image. Each query is scored by its refusal log-odds: the log-odds, in nats, that the answer
# begins as a refusal. No text is generated. `placebos=4` adds four random edits of the same norm to every cell.

# %%
queries = gl.organism.queries("validation")
effect = gl.sweep(model, guard, queries, grey, scores=[scores.refusal_logodds], placebos=4)
print(effect)

# %% [markdown]
# `summary()` has the mean change against the unedited run, with an interval that resamples clusters of requests. As a line over the
# layers:

# %%
curves = effect.summary().assign(metric=lambda rows: rows["label"], run=lambda rows: rows["variant"], value=lambda rows: rows["change"])
titles = {label: f"{label} requests: Δ refusal log-odds (nats)" for label in ("harmful", "harmless")}
axes = plots.layer_curves(curves, titles=titles)

# %% [markdown]
# Harmful requests gain most in the last three layers. Harmless ones gain less there than in layers 3 and 4, where the direction can't
# tell the classes well and the gate opens for many of them. The placebo stays near 0 or falls below. The numbers:

# %%
rows = effect.summary().query("layer >= 3")
rows = rows.assign(shown=[f"{row.change:+.2f} [{row.low:+.2f}, {row.high:+.2f}] (n={row.n})" for row in rows.itertuples()])
rows.pivot_table(index="layer", columns=["variant", "label"], values="shown", aggfunc="first", sort=False)

# %% [markdown]
# Where the line of the placebo lies below 0, a random push of that size does harm: it is not a zero to compare with, but a part of what
# any edit of that size does. Four draws are taken together here, and random pushes up and down cancel in a mean; each draw is in
# `effect.frame`.
#
# ## What did it cost?
#
# The naive way is one run per cell. `facts["layout"]` says what was done instead.

# %%
print(effect.facts["layout"], "for", len(effect.frame[["variant", "layers", "strength"]].drop_duplicates()), "cells")

# %% [markdown]
# `branch`: an edit of the last token changes nothing before it, so the prompts ran once and every cell rode along as one more token. An
# edit of *all* tokens can't: it is computed as copies of the batch, and the fact says why. The result would be the same either way.

# %%
everywhere = gl.sweep(model, iv.add(ssd).at(positions="all"), queries[60:84], grey, layers=[5], placebos=0)
print(everywhere.facts["layout"])

# %% [markdown]
# ## Choose a layer, and ask how sure that is
#
# `best` names the layer at which harmful requests gain most, less any gain of harmless ones. This choice is made on validation; a test
# split that has helped to choose can't judge any more.

# %%
print("best layer:", effect.best(1), "  best two:", effect.best(2))

# %% [markdown]
# The intervals of the last layers overlap. Might another sample of requests have chosen another one? We draw the clusters anew a thousand
# times and let each draw choose by the same rule.

# %%
edits = effect.frame.query("variant == 'edit'").assign(change=lambda rows: rows["value"] - rows["base"])
changes = edits.pivot_table(index=["label", "cluster", "query"], columns="layer", values="change")
merit = []
for label in ("harmful", "harmless"):
    part = changes.loc[label]
    counts = intervals.resample_counts(len(part), part.index.get_level_values("cluster").to_numpy(), draws=1000)
    merit.append(counts @ part.to_numpy() / counts.sum(axis=1, keepdims=True))
chosen = pd.Series((merit[0] - merit[1].clip(min=0)).argmax(axis=1)).value_counts(normalize=True)
print("share of draws that choose a layer:", {layer: round(share, 2) for layer, share in chosen.sort_index().items()})

# %% [markdown]
# The same requests stand behind all layers, so the difference between two layers is surer than either of them, and the choice is surer
# than the overlap of the intervals suggests. (That is sampling noise alone. Another image or another kind of request may choose
# differently.) Groups of layers are swept like single ones. Is editing several at once better than one?

# %%
grouped = gl.sweep(model, guard, queries, grey, scores=[scores.refusal_logodds], layers=[7, (6, 7), (5, 6, 7)], placebos=0)
grouped.summary()[["layers", "label", "change", "low", "high", "n"]].round(2)

# %% [markdown]
# It is not, within the intervals: what an earlier layer replaced is replaced again at the last.
#
# ## Do the answers follow?
#
# Log-odds are not behaviour. So the guard at the chosen layer and its placebo generate answers, beside the grey image and a white one,
# which had no part in the choice. `asr` counts harmful requests that are answered, `non_refusal` those that are not refused, whatever
# else the answer is.

# %%
white, chosen = presentations.blank("white"), guard.at(layers=effect.best(1))
arms = {"none": iv.nothing, "guard": chosen, "placebo": [chosen.placebo(seed) for seed in range(4)]}
answers = gl.evaluate(model, arms, queries, [grey, white], judge=gl.organism.judge, max_new_tokens=10, batch_size=256)
rates = [(rate, way.name) for rate in ("asr", "non_refusal", "over_refusal") for way in (grey, white)]
pd.DataFrame({(rate, way): {arm: str(answers.rate(rate, arm, way)) for arm in arms} for rate, way in rates}).T

# %% [markdown]
# With the guard no harmful request is answered, also beside the white image, and few harmless ones are refused. The placebo leaves most
# of the gap. Its n counts four draws together, and its interval knows how the queries vary, not how the draws do. So look at the draws,
# too:

# %%
for draw in range(4):
    one = answers.where(draw=draw)
    print(f"placebo {draw}:", *(f"{way.name} {one.rate('asr', 'placebo', way.name)}" for way in (grey, white)), sep="   ")

# %% [markdown]
# One random direction is not like another, and a single draw may flatter or slander an edit: take several. None comes near the guard.
#
# These are validation queries: the numbers show that the choice works as meant, not how well it generalises. [Tutorial
# 6](6_evaluate_defences.md) reads the test split, once.
#
# ## Keep the prompts, think, and sweep again
#
# One sweep raises the next question. `gl.keep` holds on to the keys and values of the prompts and to what the text twin gave, so no
# prompt runs again.

# %%
prompts = gl.keep(model, queries, grey)
print(prompts)

# %% [markdown]
# *What is the gate for?* The same edit with the gate, without it, and with the literal threshold 0 of the paper. Look at the harmless
# requests.

# %%
edit = iv.replace(ssd, iv.text_twin)
interventions = {"midpoint": edit.when(gates.harmful(ssd)), "no gate": edit, "threshold 0": edit.when(gates.harmful(ssd, 0.0))}
began = time.perf_counter()
gated = gl.sweep(model, interventions, prompts, scores=[scores.refusal_logodds], layers=[3, 5, 7], placebos=0)
print(f"{time.perf_counter() - began:.2f} s,", gated.facts["layout"])
gated.summary().pivot_table(index=["intervention", "label"], columns="layer", values=["change", "low", "high"], sort=False).round(2)

# %% [markdown]
# Without the gate harmless requests rise, too: the image has moved them down as well, and they are moved back up. The midpoint and 0 do
# nearly the same in the later layers, and differ in layer 3. A rise is not a refusal yet; [tutorial 4](4_compose_a_guard.md) counts
# those.
#
# How much does keeping save? The same question asked of fresh and of kept prompts:

# %%
print(model.batch(queries[0], grey).mask.shape[1], "tokens per prompt")
began = time.perf_counter()
gl.sweep(model, guard, queries, grey, layers=[7], placebos=0)
middle = time.perf_counter()
gl.sweep(model, guard, prompts, layers=[7], placebos=0)
print(f"fresh {middle - began:.2f} s, kept {time.perf_counter() - middle:.2f} s")

# %% [markdown]
# What is left to compute is one token per query and cell. These prompts are short; with hundreds of image tokens, keeping is what makes
# the next question cheap ([measured](../results/benchmarks.md), [why](../explanation/sweeps.md)).
#
# ## The whole map
#
# The last question: *how strong?* Strength s means h + s (edit(h) − h), the same for every edit: 1 is the edit, ½ half of the way, 2
# beyond it.

# %%
strong = gl.sweep(model, guard, prompts, scores=[scores.refusal_logodds], strengths=[0.5, 1.0, 2.0, 4.0], placebos=2)
axes = strong.plot()

# %% [markdown]
# One colour scale for all panels. In the last layers twice the edit brings little more than the edit, and four times brings no more at
# layers 6 and 7. In layers 3 and 4 strength raises both classes. And the placebo's panels show that a push as long as a strong edit's
# does damage of its own. So take the mildest strength that does the work; here that is about 1.
#
# ## What this can't tell
#
# That the last layers are best is a fact about a model of eight layers whose classes separate at layer 5; nothing says that the last
# layers are best elsewhere, and in larger models an edit near the end often comes too late. Refusal log-odds know the first word of an
# answer alone. The layer, the image and the split are the ones of the choice, so the height of the best cell is flattered by having been
# chosen.
#
# ## Try next
#
# *Does another reading of the method choose another layer?*
#
# ```python
# readings = {name: defences.vlm_guard(ssd, reading=name).intervention for name in ("replace", "add", "amplify", "project")}
# again = gl.sweep(model, readings, prompts)
# {name: again.best(1, intervention=name) for name in readings}
# ```
#
# *How much does the edit change at all?* Without `scores=`, a sweep also measures the KL divergence from the unedited run:
# `again.plot("kl")`.
#
# *Which heads write what is replaced?* That is [tutorial 5](5_attribution_and_patching.md).
#
# More: [`sweep` and `keep`](../api/sweep.md), [scores](../api/judges.md), [defences](../api/defences.md), [results as
# tables](../how-to/results.md).
