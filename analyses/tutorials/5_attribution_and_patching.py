# %% [markdown]
# # Which heads write the direction: attribution and patching
#
# Beside an image, harmful requests lie lower on the safety direction than in text, and fewer of them are refused. Which attention heads are
# behind that? *Attribution* says what each head writes onto the direction. *Patching* says what putting a head's text output back does to
# refusal. This page runs both, lays them side by side, and says what neither of them proves.
#
# ![Share of the loss that each head wrote, and share of refusal that patching it brings back](5_attribution_and_patching/end.png)
#
# You need: guardlens; no GPU, no download. It takes: about 15 seconds on the organism, on two CPU cores.

# %% [markdown]
# ## What each part writes
#
# The directions come from training pairs, everything else on this page from validation requests. `by_token_source` will ask where heads
# read, so attention has to be eager.

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
# `gl.attribute` splits each request's coordinate on the direction into what wrote it. We take the direction of the last layer, since every
# head lies before it.

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
# They agree up to rounding, so nothing is left out and nothing counted twice. Now the question in numbers: how far do requests fall along
# the direction beside the image? Intervals resample the clusters that requests come in.

# %%
for label, rows in per_query.groupby("label"):
    change = mean_difference(rows["text"].to_numpy(), rows[grey.name].to_numpy(), rows.index.get_level_values("cluster").to_numpy())
    print(f"{label}: {rows['text'].mean():.1f} in text, {rows[grey.name].mean():.1f} beside grey; change {change}")

# %% [markdown]
# Both classes fall, and harmful requests fall further. Which parts are behind the fall of the harmful ones? Red writes towards harmful,
# blue towards harmless; the panel on the right is the change, on a scale of its own.

# %%
parts.plot(label="harmful")

# %% [markdown]
# Few heads do most of it, all from block 3 on. The largest writers and the largest changes are not the same heads: one head of block 1
# writes much in both runs, and so explains none of the loss. `top` has the numbers, with 95 % intervals over requests.

# %%
parts.top(6, label="harmful").round(2)

# %% [markdown]
# Does the image write *against* the direction, or do heads write less of what they read in the text? Here the heads are summed by the kind
# of token whose values they mix.

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
# Most of the loss is text that is no longer passed on; what heads write from the image tokens themselves is a small part. (Attention sums
# to one, so what goes to the image is missing elsewhere. But the values of text tokens may have changed, too: this sum can't tell the two
# apart.)

# %% [markdown]
# ## What a patch brings back
#
# Attribution says what is written, not whether anything listens. Patching intervenes: the run beside grey gets one state of the text twin,
# and we see how far the refusal log-odds return. First whole states by layer: from where on does the text's state bring refusal back?

# %%
gl.activation_patching(model, queries, grey, hooks=["resid_post", "attn_out", "mlp_out"]).plot()

# %% [markdown]
# The last token's state of the early layers brings nothing back: the difference is not there yet, it is still in the tokens before. It
# arrives through attention from the third layer on, and MLPs by themselves bring back little. Now the heads one by one, in the same unit
# for both classes, so that a patch that pushes everything towards refusal would show.

# %%
patched = gl.activation_patching(model, queries, grey, hooks="z")
patched.plot("change")

# %% [markdown]
# The same few heads stand out for harmful requests, and move harmless ones less. Before we believe a cell, the placebo: each head patched
# with its own state, which must change nothing.

# %%
placebo = gl.activation_patching(model, queries, grey, donor=grey, hooks="z")
print(f"largest change of any request by any placebo: {(placebo.frame['value'] - placebo.frame['base']).abs().max():.0e} nats")

# %% [markdown]
# ## Side by side
#
# To compare the two, give them one unit: the share of what was lost. For attribution, a head's change over the change of the whole
# coordinate; for patching, the share of the lost log-odds that comes back.

# %%
written = parts.summary().query("label == 'harmful' and presentation == @grey.name")
lost = written["change"].sum()
written = written[written["component"] == "head"].groupby(["block", "head"], as_index=False)[["value", "change"]].sum()
back = patched.summary().query("label == 'harmful'").rename(columns={"layer": "block"})
both = written.assign(attribution=written["change"] / lost).merge(back[["block", "head", "recovered", "recovered_low", "recovered_high"]])
both.sort_values("recovered", ascending=False).head(8).round(2)

# %% [markdown]
# Where they agree: the order. Where they don't: the sizes. A head in block 3 brings back about twice what it writes itself, because later
# heads read what it adds. And patches don't add up, as this sum over all heads shows.

# %%
rank = both["attribution"].corr(both["recovered"], method="spearman")
print(f"rank correlation over {len(both)} heads: {rank:.2f}")
print(
    f"sum over heads: attribution {both['attribution'].sum():.2f} of the loss (MLPs are the rest), patching {both['recovered'].sum():.2f}"
)

# %% [markdown]
# Patching also depends on which way one goes. Above, text states mended the run beside grey. The other way round, grey states damage the
# text run: is a head that *suffices* to bring something back also *needed*?

# %%
damaged = gl.activation_patching(model, queries, presentations.text_only, donor=grey, hooks="z")
needed = damaged.summary().query("label == 'harmful'").rename(columns={"layer": "block", "recovered": "lost by damage"})
ways = both[["block", "head", "recovered"]].merge(needed[["block", "head", "lost by damage"]])
print(ways.sort_values("recovered", ascending=False).head(5).round(2).to_string(index=False))
print(f"sum over heads: recovered {ways['recovered'].sum():.2f}, lost by damage {ways['lost by damage'].sum():.2f}")

# %% [markdown]
# No single head is needed: damage any one of them and the others hold most of the refusal up. Quote both ways, or say which one you took.
# To end, the two methods as maps.

# %%
panels = {"attribution: share of the loss": "attribution", "patching: share recovered": "recovered"}
maps = pd.concat([both.assign(panel=name, value=both[column]) for name, column in panels.items()])
component_plots.head_maps(maps, unit="share, harmful requests")

# %% [markdown]
# ## What neither of them proves
#
# - *Attribution* counts direct writes onto one direction. A head that works through other heads gets nothing, and what is written need
#   not be read. Another direction, or another layer, gives another map.
# - *Patching* says what one state does in one context. Its shares overlap, so they are no budget, and both ways give other numbers.
# - Neither names what a head *computes*, and neither says that a guard should edit there: that is for [a sweep](3_layer_sweep.md).
# - All of this is one model of one seed beside one image. Repeat it beside another image and on other requests before you believe it.
#
# ## Try next
#
# - Another image: `presentations.blank("white")`, or `presentations.noise(size=model.cfg.image_size)`. Do the same heads lead?
# - Another layer: `gl.attribute(..., layer=5)`, where the last blocks have not yet written.
# - Reference: [attribution and patching](../api/attribution.md), [presentations and queries](../api/queries.md),
#   [intervals](../api/tables.md). On a model of your own: [tutorial 7](7_your_own_vlm.md).
