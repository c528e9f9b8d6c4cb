# %% [markdown]
# # Which heads write the direction: attribution and patching
#
# Beside an image, harmful requests lie lower on the safety direction than in text, and fewer of them are refused. Which attention heads
# cause this? *Attribution* shows what each head writes onto the direction. *Patching* shows what restoring a head's text output does to
# refusal. This page runs both, compares them, and says what neither of them proves.
#
# ![Share of the loss that each head wrote, and share of refusal that patching it brings back](5_attribution_and_patching/end.png)
#
# You need guardlens, but no GPU and no download. The cells take about 15 seconds on the organism, on two CPU cores.

# %% [markdown]
# ## What each part writes
#
# The directions come from training pairs, and everything else comes from validation requests. `by_token_source` splits heads by the tokens
# that they read, so attention has to be eager.

# %%
import pandas as pd

import guardlens as gl
from guardlens import directions, presentations
from guardlens.results.intervals import mean_difference
from guardlens.results.plots import components as component_plots

gl.progress_bars(False)
model = gl.load("organism", attn_implementation="eager")
grey = presentations.blank("grey")
queries = gl.organism.queries("validation")
ssd = directions.ssd(gl.collect(model.llm, gl.organism.pairs()))
print(model, f"{model.cfg.n_heads} heads in each layer", ssd, f"{len(queries)} validation requests", sep="\n")

# %% [markdown]
# `gl.attribute` splits each request's coordinate on the direction into the components that wrote it. We take the direction of the last
# layer, since every head lies before it.

# %%
layer = model.cfg.n_layers - 1
parts = gl.attribute(model, ssd, queries, grey, layer=layer, by_token_source=True)
print(parts)

# %% [markdown]
# The residual stream is a sum, so the parts must add up to the coordinate that `gl.collect` reads. Look at the largest difference between
# the sum of a request's parts and its coordinate.

# %%
per_query = parts.frame.pivot_table(index=["label", "cluster", "query"], columns="presentation", values="value", aggfunc="sum")
for name, run in {
    "text": gl.collect(model.llm, queries),
    grey.name: gl.collect(model, queries, grey),
}.items():
    read = pd.Series(ssd.coordinates(run)[:, layer, 0].numpy(), index=[query.id for query in queries])
    summed = per_query[name].droplevel(["label", "cluster"])[read.index]
    print(f"{name}: largest difference {(summed - read).abs().max():.0e}, of coordinates up to {read.abs().max():.0f}")

# %% [markdown]
# They agree up to rounding, so nothing is left out and nothing is counted twice. How far do requests fall along the direction beside the
# image? Intervals resample clusters of requests.

# %%
for label, rows in per_query.groupby("label"):
    change = mean_difference(rows["text"].to_numpy(), rows[grey.name].to_numpy(), rows.index.get_level_values("cluster").to_numpy())
    print(f"{label}: {rows['text'].mean():.1f} in text, {rows[grey.name].mean():.1f} beside grey; change {change}")

# %% [markdown]
# Both classes fall, and harmful requests fall further. Which parts cause the fall of the harmful ones? Red cells write towards harmful,
# blue cells towards harmless; the panel on the right shows the change, on a scale of its own.

# %%
parts.plot(label="harmful")

# %% [markdown]
# A few heads cause most of it, all of them from block 3 on. The largest writers are not the heads with the largest changes: one head of
# block 1 writes much in both runs, and so explains none of the loss. `top` has the numbers, with 95 % intervals over requests.

# %%
parts.top(6, label="harmful").round(2)

# %% [markdown]
# Do heads write *against* the direction from the image, or less of what they read in the text? This cell sums heads by the kind of token
# whose values they mix.

# %%
heads = parts.frame.query("label == 'harmful' and component == 'head'")
sources = heads.pivot_table(
    index=["cluster", "query"], columns=["token_source", "presentation"], values="value", aggfunc="sum", fill_value=0
)
clusters = sources.index.get_level_values("cluster").to_numpy()
for source in ("text", "image"):
    before = sources.get((source, "text"), 0 * sources["text", "text"])
    print(f"written from {source} tokens, change: {mean_difference(before.to_numpy(), sources[source, grey.name].to_numpy(), clusters)}")

# %% [markdown]
# Most of the loss is what heads no longer pass on from the text; what they write from the image tokens themselves is a small part.
# (Attention weights sum to one, so what goes to the image is missing elsewhere. But the values of text tokens may have changed, too: this
# sum can't tell the two apart.)

# %% [markdown]
# ## What a patch brings back
#
# Attribution shows what is written, but not whether the model uses it. Patching intervenes: the run beside grey gets one state of the text
# twin, and we measure how far the refusal log-odds return. We first patch whole states by layer: from which layer on does the text's state
# bring refusal back?

# %%
gl.activation_patching(model, queries, grey, hooks=["resid_post", "attn_out", "mlp_out"]).plot()

# %% [markdown]
# At early layers, the last token's state brings nothing back: the difference is still in the tokens before it. It arrives through attention
# from layer 3 on, and MLPs by themselves bring back little. Now we patch the heads one by one. Both classes have the same unit, which shows
# whether a patch pushes everything towards refusal.

# %%
patched = gl.activation_patching(model, queries, grey, hooks="z")
patched.plot("change")

# %% [markdown]
# The same few heads stand out for harmful requests, and patching them moves harmless ones less. Before we believe a cell, we run the
# placebo: each head is patched with its own state, which must change nothing.

# %%
placebo = gl.activation_patching(model, queries, grey, donor=grey, hooks="z")
print(f"largest change of any request by any placebo: {(placebo.frame['value'] - placebo.frame['base']).abs().max():.0e} nats")

# %% [markdown]
# ## Side by side
#
# To compare the two methods, we give both one unit, the share of the loss. For attribution, this is a head's change over that of the whole
# coordinate; for patching, it is the share of the lost log-odds that comes back.

# %%
written = parts.summary().query("label == 'harmful' and presentation == @grey.name")
lost = written["change"].sum()
written = written[written["component"] == "head"].groupby(["block", "head"], as_index=False)[["value", "change"]].sum()
back = patched.summary().query("label == 'harmful'").rename(columns={"layer": "block"})
both = written.assign(attribution=written["change"] / lost).merge(back[["block", "head", "recovered", "recovered_low", "recovered_high"]])
both.sort_values("recovered", ascending=False).head(8).round(2)

# %% [markdown]
# The two methods agree on the order of the heads, and differ in the sizes. A head in block 3 brings back about twice what it writes itself,
# because later heads read what it adds. And patches don't add up, as this sum over all heads shows.

# %%
rank = both["attribution"].corr(both["recovered"], method="spearman")
print(f"rank correlation over {len(both)} heads: {rank:.2f}")
print(
    f"sum over heads: attribution {both['attribution'].sum():.2f} of the loss (MLPs are the rest), patching {both['recovered'].sum():.2f}"
)

# %% [markdown]
# Patching also depends on which run is patched. Above, text states repaired the run beside grey. Now grey states damage the text run: is a
# head that is *sufficient* to bring something back also *necessary*?

# %%
damaged = gl.activation_patching(model, queries, presentations.text_only, donor=grey, hooks="z")
needed = damaged.summary().query("label == 'harmful'").rename(columns={"layer": "block", "recovered": "lost by damage"})
ways = both[["block", "head", "recovered"]].merge(needed[["block", "head", "lost by damage"]])
print(ways.sort_values("recovered", ascending=False).head(5).round(2).to_string(index=False))
print(f"sum over heads: recovered {ways['recovered'].sum():.2f}, lost by damage {ways['lost by damage'].sum():.2f}")

# %% [markdown]
# No single head is necessary: if any one of them is damaged, the others keep most of the refusal. Report both experiments, or say which one
# you ran. The last figure maps the two methods.

# %%
panels = {"attribution: share of the loss": "attribution", "patching: share recovered": "recovered"}
maps = pd.concat([both.assign(panel=name, value=both[column]) for name, column in panels.items()])
component_plots.head_maps(maps, unit="share, harmful requests")

# %% [markdown]
# ## What neither of them proves
#
# - *Attribution* counts direct writes onto one direction. A head that works through other heads gets no credit, and what a head writes need
#   not be read. Another direction, or another layer, gives another map.
# - *Patching* shows what one state does in one context. Its shares overlap and need not sum to one, and they depend on which run is
#   patched.
# - Neither shows what a head *computes*, and neither says where a guard should edit: that is a question for [a sweep](3_layer_sweep.md).
# - All of this comes from one model of one seed beside one image. Repeat it beside another image and on other requests before you believe
#   it.
#
# ## Try next
#
# - Another image: `presentations.blank("white")`, or `presentations.noise(size=model.cfg.image_size)`. Do the same heads lead?
# - Another layer: `gl.attribute(..., layer=5)`, where the last blocks have not yet written.
# - Reference: [attribution and patching](../api/attribution.md), [presentations and queries](../api/queries.md),
#   [intervals](../api/tables.md). On a model of your own: [tutorial 7](7_your_own_vlm.md).
