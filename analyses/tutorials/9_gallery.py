# %% [markdown]
# # Gallery
#
# This page shows every kind of figure that guardlens draws, each with the lines that draw it, on the embedded toy model.
#
# ![Requests along the first safety direction: apart in the LLM, shifted and blurred beside a blank image,
# brought back by VLM-Guard](9_gallery/end.png)
#
# You need guardlens, but no GPU and no download. The cells take about half a minute on the organism, on CPU.
#
# Every result has `.plot()`, which returns matplotlib axes: save a figure with `ax.figure.savefig`, or draw into axes of your own with
# `plot(ax=...)`. The colours are those of Okabe and Ito, which colour-blind readers can tell apart. A marker, a position or a number
# repeats what each colour says, so that a figure survives a grey print.

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
# The figure compares two runs of the same queries layer by layer, with bootstrap intervals and the line of chance. [See the modality
# gap](1_modality_gap.md) explains it; [`plots.layer_curves`](../api/tables.md#guardlens.results.plots.layer_curves) draws it.

# %%
axes = gl.compare(text, image, ssd).plot()

# %% [markdown]
# ## Spectrum, and similarity of the layers
#
# The figure shows how many directions carry the difference of harmful and harmless twins, and the cosine of the first directions of every
# two layers. [Find the safety direction](2_safety_direction.md) explains it;
# [`plots.basis`](../api/tables.md#guardlens.results.plots.basis) draws it from
# [`plots.spectrum`](../api/tables.md#guardlens.results.plots.spectrum) and
# [`plots.cosines`](../api/tables.md#guardlens.results.plots.cosines).

# %%
axes = ssd.plot()

# %% [markdown]
# ## Effect of an edit by layer and strength
#
# Each cell shows what happens if the edit is made at this layer with this strength, for harmful and for harmless queries, with a random
# edit of equal norm below. [Sweep the layers](3_layer_sweep.md) explains it;
# [`plots.effect_maps`](../api/tables.md#guardlens.results.plots.effect_maps) draws it.

# %%
guard = defences.vlm_guard(ssd)
effect = gl.sweep(model, guard.intervention, queries, grey, scores=[scores.refusal_logodds], strengths=[0.25, 0.5, 1])
axes = effect.plot()

# %% [markdown]
# ## Components that write a direction
#
# The figure shows heads by block as a heat map and all other components as bars; their sum is the coordinate. [Attribution and
# patching](5_attribution_and_patching.md) explains it;
# [`component_plots.component_maps`](../api/tables.md#guardlens.results.plots.components.component_maps) draws it.

# %%
axes = gl.attribute(model, ssd, queries, grey, layer=5).plot()

# %% [markdown]
# ## Heads that bring refusal back
#
# The figure shows the share of the refusal that returns when the output of one head is taken from the text-only run. [Attribution and
# patching](5_attribution_and_patching.md) explains it;
# [`component_plots.head_maps`](../api/tables.md#guardlens.results.plots.components.head_maps) draws it.

# %%
axes = gl.activation_patching(model, queries[:32], grey, hooks="z", layers=[4, 5, 6, 7]).plot()

# %% [markdown]
# ## Defences compared
#
# The figure shows the attack success rate and over-refusal with their intervals, per defence and presentation. [Evaluate
# defences](6_evaluate_defences.md) explains it; [`plots.arms`](../api/tables.md#guardlens.results.plots.arms) draws it.

# %%
chosen = defences.vlm_guard(ssd, layers=effect.best(1))
arms = {"none": defences.none, "VLM-Guard": chosen}
table = gl.evaluate(model, arms, queries, [presentations.text_only, grey], judge=gl.organism.judge)
axes = table.plot()

# %% [markdown]
# ## Queries along a direction
#
# The figure shows where each query lies along the first direction, with class means as triangles and the gate's threshold as a line: in
# text, beside a blank image, and beside it with the guard. [Compose your own guard](4_compose_a_guard.md) explains it;
# [`plots.coordinates`](../api/tables.md#guardlens.results.plots.coordinates) draws it.

# %%
guarded = gl.collect(model, queries, grey, intervention=chosen.intervention)
runs = {"LLM, text only": text, "VLM, blank image": image, "VLM, blank image, VLM-Guard": guarded}
axes = ssd.plot_coordinates(runs, layer=effect.best(1)[0])
