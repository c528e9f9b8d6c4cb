# %% [markdown]
# # See the modality gap
#
# A vision-language model (VLM) may answer a request beside an image that its language model (LLM) refuses in text, even if the image is
# blank. Inside, do harmful and harmless requests become hard to tell apart, or do they stay apart and only move? This tutorial goes from
# the installation to a figure that answers this for one model.
#
# ![Requests along the safety direction at layer 5: in text, after a caption, and beside a blank image](1_modality_gap/end.png)
#
# You need Python 3.11 or newer and the source of guardlens, but no GPU and no download of a model. After the installation, the cells take
# half a minute on the organism, on CPU.

# %% [markdown]
# ## Install
#
# Run this in a terminal, in the folder of the source:
#
# ```sh
# python3 -m venv .venv
# . .venv/bin/activate
# pip install ".[notebook]"
# jupyter lab
# ```
#
# On Linux, pip's default torch brings CUDA packages of several gigabytes; if a CPU build of torch is installed first, pip uses that
# instead. In Jupyter, open a new notebook and type the cells below, or open this page's notebook from the link under the title. `python
# FILE.py` runs the same cells as a script, which shows no figures: save them with `gl.plots.save(axes[0].figure, "gap")`.

# %%
import numpy as np

import guardlens as gl
from guardlens import defences, directions, presentations
from guardlens.experiments import separability
from guardlens.results import intervals

# %% [markdown]
# ## A model and its queries
#
# `gl.load` takes a hub id, a directory or a module in memory. We load the *organism*: a tiny LLaVA that comes with guardlens, trained from
# scratch on a toy language. Remember its size when you read the numbers below.

# %%
gl.progress_bars(False)
model = gl.load("organism")
print(model, f"{sum(p.numel() for p in model.hf.parameters()) / 1e6:.1f} million parameters")

# %% [markdown]
# A *query* is a text with a label, harmful or harmless. In this world, whether a request is harmful depends on its verb and its noun
# together. Look at one of each, and at how many there are.

# %%
queries = gl.organism.queries("validation")
harmful = [query for query in queries if query.label == "harmful"]
print(f"{len(harmful)} harmful queries, such as {harmful[0].text!r}")
print(f"{len(queries) - len(harmful)} harmless queries, such as {queries[-1].text!r}")

# %% [markdown]
# A *presentation* says how a query reaches the model. `text_only` gives the model the text alone, as the LLM sees it; `blank("grey")` adds
# a flat grey image.

# %%
text, grey = presentations.text_only, presentations.blank("grey")
for query in harmful[:4]:
    print(query.text, "\n   text:", model.generate(query, text), "\n   grey:", model.generate(query, grey))

# %% [markdown]
# In text, all four are refused. Beside a flat image, some are answered, and a refusal may lose words. Four answers prove nothing, so we
# count.
#
# ## How large is the gap?
#
# `gl.evaluate` asks every query under every presentation, and a judge reads the answers. The attack success rate (ASR) is the share of
# harmful queries that are answered; over-refusal is the share of harmless ones that are refused. A third presentation is our control: the
# same request after a *caption* in words. The caption makes the prompt longer and describes an image, but there is none.

# %%
caption = presentations.framed(text, before="a red circle on grey . ", label="caption")
shown = [text, caption, grey]
answers = gl.evaluate(model, {"none": defences.none}, queries, shown, judge=gl.organism.judge, max_new_tokens=16)
for name in ("text", "text | caption", "blank grey"):
    print(f"{name:15} ASR {answers.rate('asr', 'none', name)}   over-refusal {answers.rate('over_refusal', 'none', name)}")

# %% [markdown]
# The brackets show 95 % intervals. They resample clusters of requests that share a verb group and a noun group, since these stand or fall
# together. The intervals of text and of the grey image are far apart: this is the modality gap. The caption moves the rate much less than
# the image does, and hardly any harmless request is refused under any presentation. So the cause is not the longer prompt, and the model
# has not just become careless or strict: it answers harmful requests beside an image.
#
# ## Look inside
#
# `gl.collect` reads the residual stream after every layer at the last token of the prompt, one vector per query and layer.

# %%
in_text, after_caption, beside_grey = (gl.collect(model, queries, way) for way in shown)
print(in_text)

# %% [markdown]
# Next we need a direction along which harmful and harmless requests differ *in text*. It must come from other requests than those we look
# at. `pairs` are 100 harmful requests with harmless twins from the training split, and `directions.ssd` computes the safety steering
# directions of VLM-Guard from them. [Tutorial 2](2_safety_direction.md) asks how far to trust these directions.

# %%
pairs = gl.organism.pairs()
ssd = directions.ssd(gl.collect(model.llm, pairs))
print(ssd, "from", len(pairs), "pairs;", len({q.text for q in pairs.queries} & {q.text for q in queries}), "of their texts are asked below")

# %% [markdown]
# `gl.compare` compares the runs layer by layer. Its three panels answer three questions:
#
# - *AUROC*: does a harmful request lie above a harmless one along the direction? Only the order counts.
# - *Accuracy at the midpoint*: how often is the LLM's own threshold right? A shift of all requests changes this accuracy, but not the
#   AUROC.
# - *Drift along the direction*: how far does a request move from its place in text, in units of the mean norm of the states?

# %%
gap = gl.compare(in_text, [after_caption, beside_grey], ssd)
axes = gap.plot()

# %% [markdown]
# The AUROC climbs with depth and is close to 1 from layer 5 on, and its curves overlap: the *order* of the requests survives the image. But
# beside the image the accuracy at the LLM's threshold is lower in these layers, and the states have drifted to the negative, harmless side.
# Before we believe an AUROC near 1, we look at the words alone:

# %%
words = intervals.Interval(*gap.facts["bag_of_words"], n=len(queries))
print("AUROC of a bag of words, without any model:", words)

# %% [markdown]
# It is below one half, because single words mislead on held-out combinations. So the states show more than which words occur.
#
# ## Shift, or loss of separability?
#
# We look at the numbers of layer 5. `d_prime` is the distance between the class means in standard deviations. Like the AUROC, it ignores a
# shift, but it falls when two classes that are still in order come closer or spread. `change` is the difference from the LLM's run, paired
# by query.

# %%
layer = 5
columns = ["metric", "run", "value", "low", "high", "change", "change_low", "change_high", "n"]
gap.where(layer=layer).frame.query("metric in ['auroc', 'd_prime', 'midpoint_accuracy', 'drift_along']")[columns].round(2)

# %% [markdown]
# Both other runs separate the classes less cleanly than text (`d_prime`), and both lose accuracy. The image differs from the caption in its
# drift. An accuracy counts two kinds of error together, so we look at them one by one: which share of each class lies above the LLM's
# threshold? As a thought experiment, we also move the image's run back by its mean drift, one number that uses no label.

# %%
coordinate = {run.presentation: ssd.coordinates(run)[:, layer, 0].numpy() for run in (in_text, after_caption, beside_grey)}
coordinate["grey, moved back"] = coordinate["blank grey"] - (coordinate["blank grey"] - coordinate["text"]).mean()
threshold, clusters = float(ssd.midpoints[layer]), np.array([query.cluster for query in queries])
classes = {"harmful": in_text.harmful, "harmless": ~in_text.harmful}
for name, along in coordinate.items():
    above = {label: intervals.proportion(along[chosen] > threshold, clusters[chosen]) for label, chosen in classes.items()}
    print(f"{name:16} above the threshold: harmful {above['harmful']}, harmless {above['harmless']}")

# %% [markdown]
# After the caption, both classes have errors, and the harmless class has more. Beside the image, all errors are harmful requests below the
# threshold. Moved back, nearly all of them are above it again. So beside the image, at this layer, the threshold fails mostly because of
# the *shift*. The loss of separability is real but smaller, and it is not what sets the image apart.
#
# Does the shift hit both classes alike?

# %%
for label, chosen in classes.items():
    moved = intervals.mean_difference(coordinate["text"][chosen], coordinate["blank grey"][chosen], clusters[chosen])
    print(f"{label:9} requests move by {moved}")
distance = coordinate["text"][classes["harmful"]].mean() - coordinate["text"][classes["harmless"]].mean()
print(f"in text, the means of the classes are {distance:.1f} apart")

# %% [markdown]
# Both classes move to the harmless side, and harmful requests move further. There is a common shift, and the classes also come closer.
#
# ## Does it matter for the answers?
#
# A coordinate is only interesting if behaviour follows it. Among the *harmful* requests beside the image, does a refused request lie higher
# than an answered one? An AUROC of 0.5 would mean that it does not. The second row uses the coordinate of the same requests in text.

# %%
refused = answers.where(presentation="blank grey", label="harmful").columns["verdict"] == "refused"
print(refused.sum(), "of", len(refused), "harmful requests refused beside the image. AUROC of the coordinate for that:")
for name in ("blank grey", "text"):
    along = coordinate[name][classes["harmful"]]
    found = intervals.bootstrap(
        lambda drawn, along=along: separability.auroc(along[drawn], refused[drawn]), len(along), clusters[classes["harmful"]]
    )
    print(f"   {name:10} {found}")

# %% [markdown]
# The answered requests lie lowest beside the image. Their coordinate in text partly predicts this: those near the threshold are the first
# to slide over it. This is a correlation. Whether moving a request back restores its refusal is a question for an edit, in [tutorial
# 3](3_layer_sweep.md).
#
# In the next figure, each panel is a run, each hill is a class, the triangles are the means, and the dashed line is the LLM's threshold.

# %%
runs = {"LLM, text": in_text, "LLM, text after a caption": after_caption, "VLM, beside a grey image": beside_grey}
axes = ssd.plot_coordinates(runs, layer)

# %% [markdown]
# Beside the image the harmful hill slides over the threshold; after the caption it does not.
#
# ## What this can't tell
#
# The organism shows that such a shift can arise from harmless visual tuning, and how to measure it. It can't tell how large the shift is in
# a model that people use, at which layers it occurs, or whether it is a shift rather than a loss of separability there: with six training
# seeds the size of the gap varied widely ([all of them](../results/organism_seeds.md)). One image and one kind of request say nothing about
# others. And a coordinate along one direction is one view of a state that has many.
#
# ## Try next
#
# *Is it the colour?* Any colour, noise or the query's own image is a presentation:
#
# ```python
# ways = [presentations.blank("white"), presentations.noise(size=model.cfg.image_size), presentations.own_images]
# gl.compare(in_text, [gl.collect(model, queries, way) for way in ways], ssd).plot()
# ```
#
# *Would a probe that is trained on text still work beside the image?* The same table has another panel: `gap.plot(["probe", "transfer"])`.
#
# *What about your model?* Use `gl.load("llava-hf/llava-1.5-7b-hf")`, with `gl.read_queries("pairs.jsonl")` in place of the organism's
# queries and `judges.keyword` in place of its judge.
#
# More: [how to bring your own data](../how-to/data.md), [`compare`](../api/separability.md), [`collect`](../api/activations.md), [queries
# and presentations](../api/queries.md), [intervals](../api/tables.md).
