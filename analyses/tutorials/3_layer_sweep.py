# %% [markdown]
# # Sweep the layers
#
# At which layer does an edit bring refusals back, how strong must it be, and what does it do to harmless requests? A sweep tries all layers
# and strengths at once, with a placebo beside every cell, and costs little more than a single run. We sweep VLM-Guard's edit, choose a
# layer, ask how certain that choice is, and cache the prompts.
#
# ![Change of the refusal log-odds by layer and strength: the guard and its placebo, harmful and harmless requests](3_layer_sweep/end.png)
#
# You need guardlens, installed as in [tutorial 1](1_modality_gap.md). The cells take half a minute on the organism, on CPU.

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
# direction becomes that of the *text twin*, the same request as the LLM sees it, if the twin looks harmful. It names no layer, so it is
# *free*: a sweep may move it.

# %%
guard = defences.vlm_guard(ssd).intervention
print(guard)
print("free:", guard.free)

# %% [markdown]
# ## One sweep
#
# We sweep over the validation split, beside a grey image. The score of a query is its refusal log-odds: the log-odds, in nats, that the
# answer begins as a refusal. No text is generated. `placebos=4` adds four random edits of the same norm to every cell.

# %%
queries = gl.organism.queries("validation")
effect = gl.sweep(model, guard, queries, grey, scores=[scores.refusal_logodds], placebos=4)
print(effect)

# %% [markdown]
# `summary()` has the mean change from the unedited run, with an interval that resamples clusters of requests. We draw it as a line over the
# layers:

# %%
curves = effect.summary().assign(metric=lambda rows: rows["label"], run=lambda rows: rows["variant"], value=lambda rows: rows["change"])
titles = {label: f"{label} requests: Δ refusal log-odds (nats)" for label in ("harmful", "harmless")}
axes = plots.layer_curves(curves, titles=titles)

# %% [markdown]
# The log-odds of harmful requests rise most in the last three layers. Those of harmless requests rise less there than in layers 3 and 4,
# where the direction separates the classes poorly and the gate opens for many harmless requests. The placebo stays near 0 or falls below.
# The table has the numbers:

# %%
rows = effect.summary().query("layer >= 3")
rows = rows.assign(shown=[f"{row.change:+.2f} [{row.low:+.2f}, {row.high:+.2f}] (n={row.n})" for row in rows.itertuples()])
rows.pivot_table(index="layer", columns=["variant", "label"], values="shown", aggfunc="first", sort=False)

# %% [markdown]
# Where the placebo's line lies below 0, a random push of that size does harm. So the placebo is not simply 0: it shows what any edit of
# that size does. In the mean of four draws, pushes up and down cancel; each draw is in `effect.frame`.
#
# ## What did it cost?
#
# The naive way is one run per cell. `facts["layout"]` says how the sweep ran instead.

# %%
print(effect.facts["layout"], "for", len(effect.frame[["variant", "layers", "strength"]].drop_duplicates()), "cells")

# %% [markdown]
# `branch` means that the prompts ran once, and every cell added one token: an edit of the last token changes nothing before it. An edit of
# *all* tokens runs on copies of the batch, and the fact says why. The result would be the same either way.

# %%
everywhere = gl.sweep(model, iv.add(ssd).at(positions="all"), queries[60:84], grey, layers=[5], placebos=0)
print(everywhere.facts["layout"])

# %% [markdown]
# ## Choose a layer, and ask how certain that choice is
#
# `best` names the layer at which harmful requests gain most, less any gain of harmless ones. We choose on validation, because a test split
# that has helped to choose can't judge any more.

# %%
print("best layer:", effect.best(1), "  best two:", effect.best(2))

# %% [markdown]
# The intervals of the last layers overlap. Might another sample have chosen another layer? We resample the clusters a thousand times and
# let each draw choose.

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
# All layers are scored on the same requests, so the difference between two layers is more certain than either value, and the choice is more
# certain than the overlap of the intervals suggests. (This covers sampling noise alone. Another image or another kind of request may choose
# differently.) Groups of layers are swept like single layers. Is it better to edit several layers at once?

# %%
grouped = gl.sweep(model, guard, queries, grey, scores=[scores.refusal_logodds], layers=[7, (6, 7), (5, 6, 7)], placebos=0)
grouped.summary()[["layers", "label", "change", "low", "high", "n"]].round(2)

# %% [markdown]
# It is not, within the intervals: the last layer replaces again what an earlier layer replaced.
#
# ## Do the answers follow?
#
# Log-odds are not behaviour. So the guard at the chosen layer and its placebo generate answers, beside the grey image and a white one,
# which had no part in the choice. `asr` counts harmful requests that are answered, and `non_refusal` counts those that are not refused,
# whatever else the answer is.

# %%
white, chosen = presentations.blank("white"), guard.at(layers=effect.best(1))
arms = {"none": iv.nothing, "guard": chosen, "placebo": [chosen.placebo(seed) for seed in range(4)]}
answers = gl.evaluate(model, arms, queries, [grey, white], judge=gl.organism.judge, max_new_tokens=10, batch_size=256)
rates = [(rate, way.name) for rate in ("asr", "non_refusal", "over_refusal") for way in (grey, white)]
pd.DataFrame({(rate, way): {arm: str(answers.rate(rate, arm, way)) for arm in arms} for rate, way in rates}).T

# %% [markdown]
# With the guard, no harmful request is answered, even beside the white image, and few harmless ones are refused. The placebo leaves most of
# the gap open. Its n counts four draws together, and its interval covers the variation of queries, not of draws. So we look at each draw,
# too:

# %%
for draw in range(4):
    one = answers.where(draw=draw)
    print(f"placebo {draw}:", *(f"{way.name} {one.rate('asr', 'placebo', way.name)}" for way in (grey, white)), sep="   ")

# %% [markdown]
# Random directions differ from one another, and a single draw may mislead, so take several. None of these comes near the guard.
#
# These are validation queries: the numbers show that the choice works as meant, not how well it generalises. [Tutorial
# 6](6_evaluate_defences.md) reads the test split, once.
#
# ## Cache the prompts, think, and sweep again
#
# One sweep raises the next question. `gl.keep` keeps the KV cache of the prompts and the states of their text twins, so no prompt runs
# again.

# %%
prompts = gl.keep(model, queries, grey)
print(prompts)

# %% [markdown]
# *What is the gate for?* We sweep the same edit with the gate, without it, and with the literal threshold 0 of the paper. Look at the
# harmless requests.

# %%
edit = iv.replace(ssd, iv.text_twin)
interventions = {"midpoint": edit.when(gates.harmful(ssd)), "no gate": edit, "threshold 0": edit.when(gates.harmful(ssd, 0.0))}
began = time.perf_counter()
gated = gl.sweep(model, interventions, prompts, scores=[scores.refusal_logodds], layers=[3, 5, 7], placebos=0)
print(f"{time.perf_counter() - began:.2f} s,", gated.facts["layout"])
gated.summary().pivot_table(index=["intervention", "label"], columns="layer", values=["change", "low", "high"], sort=False).round(2)

# %% [markdown]
# Without the gate, the log-odds of harmless requests rise, too: the image has moved them down as well, and the edit moves them back up. The
# midpoint and 0 do nearly the same in the later layers, and differ in layer 3. A rise is not a refusal yet; [tutorial
# 4](4_compose_a_guard.md) counts refusals.
#
# How much does the cache save? We time the same sweep with fresh and with cached prompts:

# %%
print(model.batch(queries[0], grey).mask.shape[1], "tokens per prompt")
began = time.perf_counter()
gl.sweep(model, guard, queries, grey, layers=[7], placebos=0)
middle = time.perf_counter()
gl.sweep(model, guard, prompts, layers=[7], placebos=0)
print(f"fresh {middle - began:.2f} s, cached {time.perf_counter() - middle:.2f} s")

# %% [markdown]
# With the cache, only one token per query and cell is left to compute. These prompts are short; with hundreds of image tokens, the cache is
# what makes the next question cheap ([measured](../results/benchmarks.md), [why](../explanation/sweeps.md)).
#
# ## The whole map
#
# The last question is *how strong* to edit. Strength s means h + s (edit(h) − h) for every edit: 1 is the edit itself, ½ goes half of the
# way, and 2 goes beyond it.

# %%
strong = gl.sweep(model, guard, prompts, scores=[scores.refusal_logodds], strengths=[0.5, 1.0, 2.0, 4.0], placebos=2)
axes = strong.plot()

# %% [markdown]
# All panels share one colour scale. In the last layers, strength 2 brings little more than strength 1, and strength 4 brings no more at
# layers 6 and 7. In layers 3 and 4, more strength raises both classes. And the placebo's panels show that a push as long as a strong edit's
# does damage of its own. So take the mildest strength that does the work; here that is about 1.
#
# ## What this can't tell
#
# The last layers are best in a model of eight layers whose classes separate at layer 5. Nothing says that they are best elsewhere.
# Refusal log-odds see the first word of an answer alone. The layer was chosen on
# this split and image, so the value of the best cell is biased upwards.
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
