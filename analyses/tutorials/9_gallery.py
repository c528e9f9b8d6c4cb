# %% [markdown]
# # Gallery
#
# Every kind of figure that guardlens draws, each with the lines that draw it, on the embedded toy model.
#
# ![Requests along the first safety direction: apart in the LLM, shifted and blurred beside a blank image,
# brought back by VLM-Guard](9_gallery/end.png)
#
# You need: guardlens installed, no GPU and no download. It takes: about half a minute on the organism, on CPU.
#
# Every result has `.plot()`, which returns matplotlib axes: save a figure with `ax.figure.savefig`, or draw into axes of your own with
# `plot(ax=...)`. Colours are those of Okabe and Ito, which stay apart for the colour-blind, and each is doubled by a marker, a place or a
# number, so that a figure survives a grey print.

# %%
import guardlens as gl
from guardlens import defences, directions, presentations, scores

gl.progress_bars(False)
model = gl.load("organism")
grey = presentations.blank("grey")
queries = gl.organism.queries("validation")
ssd = directions.ssd(gl.collect(model.llm, gl.organism.pairs()), rank=2)
text = gl.collect(model.llm, queries)
image = gl.collect(model, queries, grey)

# %% [markdown]
# ## Separability by layer
#
# Two runs of the same queries, layer by layer, with bootstrap intervals and the line of chance. Explained in
# [See the modality gap](1_modality_gap.md); drawn by [`plots.layer_curves`](../api/tables.md#guardlens.results.plots.layer_curves).

# %%
axes = gl.compare(text, image, ssd).plot()

# %% [markdown]
# ## Spectrum, and how alike the layers are
#
# How many directions carry the difference of harmful and harmless twins, and the cosine of the first directions of every two layers.
# Explained in [Find the safety direction](2_safety_direction.md); drawn by
# [`plots.basis`](../api/tables.md#guardlens.results.plots.basis), which is
# [`plots.spectrum`](../api/tables.md#guardlens.results.plots.spectrum) beside
# [`plots.cosines`](../api/tables.md#guardlens.results.plots.cosines).

# %%
axes = ssd.plot()

# %% [markdown]
# ## Effect of an edit by layer and strength
#
# One cell per question "what if the edit is made here, so strongly?", for harmful and for harmless queries, with a random edit of equal
# norm below. Explained in [Sweep the layers](3_layer_sweep.md); drawn by
# [`plots.effect_maps`](../api/tables.md#guardlens.results.plots.effect_maps).

# %%
guard = defences.vlm_guard(ssd)
effect = gl.sweep(model, guard.intervention, queries, grey, scores=[scores.refusal_logodds], strengths=[0.25, 0.5, 1])
axes = effect.plot()

# %% [markdown]
# ## Components that write a direction
#
# Heads by block as a heat map, all else as bars; their sum is the coordinate. Explained in
# [Attribution and patching](5_attribution_and_patching.md); drawn by
# [`component_plots.component_maps`](../api/tables.md#guardlens.results.plots.components.component_maps).

# %%
axes = gl.attribute(model, ssd, queries, grey, layer=5).plot()

# %% [markdown]
# ## Heads that bring refusal back
#
# Share of the refusal that returns when the output of one head is taken from the text-only run. Explained in
# [Attribution and patching](5_attribution_and_patching.md); drawn by
# [`component_plots.head_maps`](../api/tables.md#guardlens.results.plots.components.head_maps).

# %%
axes = gl.activation_patching(model, queries[:32], grey, hooks="z", layers=[4, 5, 6, 7]).plot()

# %% [markdown]
# ## Defences beside each other
#
# Attack success rate and over-refusal with their intervals, per defence and presentation. Explained in
# [Evaluate defences](6_evaluate_defences.md); drawn by [`plots.arms`](../api/tables.md#guardlens.results.plots.arms).

# %%
chosen = defences.vlm_guard(ssd, layers=effect.best(1))
arms = {"none": defences.none, "VLM-Guard": chosen}
table = gl.evaluate(model, arms, queries, [presentations.text_only, grey], judge=gl.organism.judge)
axes = table.plot()

# %% [markdown]
# ## Queries along a direction
#
# Where each query lies along the first direction, class means as triangles, the gate's threshold as a line: in text, beside a blank image,
# and beside it with the guard. Explained in [Compose your own guard](4_compose_a_guard.md); drawn by
# [`plots.coordinates`](../api/tables.md#guardlens.results.plots.coordinates).

# %%
guarded = gl.collect(model, queries, grey, intervention=chosen.intervention)
runs = {"LLM, text only": text, "VLM, blank image": image, "VLM, blank image, VLM-Guard": guarded}
axes = ssd.plot_coordinates(runs, layer=effect.best(1)[0])
