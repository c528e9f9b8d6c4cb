# %% [markdown]
# # Find the safety direction, and how far to trust it
#
# One line computes a direction, even from few pairs, from noise, or from pairs that have nothing to do with harm. So the question is which
# checks the direction passes that a wrong one would fail. We run the safety steering direction and two wrong ones through the same checks.
#
# ![What adding a direction does to refusal: the safety direction, one of harmless pairs, random ones](2_safety_direction/end.png)
#
# You need guardlens, installed as in [tutorial 1](1_modality_gap.md). The cells take half a minute on the organism, on CPU.

# %%
import numpy as np
import pandas as pd
import torch

import guardlens as gl
from guardlens import directions, plots
from guardlens import interventions as iv
from guardlens.experiments import separability

gl.progress_bars(False)
model = gl.load("organism")

# %% [markdown]
# ## One line, and what it does
#
# We begin with pairs: a harmful request and a harmless twin that shares its verb or its noun. We collect their states in text, after every
# layer, at the last token.

# %%
pairs = gl.organism.pairs()
fit = gl.collect(model.llm, pairs)
print(len(pairs), "pairs, such as", [query.text for query in next(iter(pairs))])
print(fit)

# %% [markdown]
# `directions.ssd` takes the differences of twins as the rows of a matrix, does not centre them, and keeps the first right singular vector.
# By hand, at one layer, this takes two lines of torch. A cosine of 1 or −1 says that both vectors lie on the same line (the SVD leaves the
# sign open, and `ssd` chooses it so that harmful is positive).

# %%
ssd = directions.ssd(fit)
bad, good = fit.pairs()
_, values, rows = torch.linalg.svd(fit.at(5)[bad] - fit.at(5)[good], full_matrices=False)
print(ssd, "; cosine with the one by hand:", f"{float(rows[0] @ ssd.at(5)[0]):.3f}")

# %% [markdown]
# ## Does one direction carry the difference?
#
# The squared singular values show how the differences are spread over directions. Look at the share of the first direction at each layer.

# %%
axes = ssd.plot()

# %% [markdown]
# In every layer the first direction carries about half of the differences or more, and in the last layers nearly all. Is that much? Noise
# has a largest singular value, too. The first wrong direction is computed in the same way from *placebo pairs*, which have harmless
# requests on both sides, none of them from the true pairs.

# %%
used = {query.text for query in pairs.queries}
harmless = [query.text for query in gl.organism.queries("train") if query.label == "harmless" and query.text not in used]
drawn = np.random.default_rng(0).permutation(len(harmless))[:200]
mock = gl.QueryPairs(*(tuple(harmless[i] for i in half) for half in (drawn[:100], drawn[100:])))
placebo_fit = gl.collect(model.llm, mock)
placebo = directions.ssd(placebo_fit)

# %% [markdown]
# The table has the share of the first direction for both, and the ratio of their first singular values:

# %%
first_share = {name: (d.spectrum[:, 0] ** 2 / (d.spectrum**2).sum(1)).numpy() for name, d in {"true": ssd, "placebo": placebo}.items()}
table = pd.DataFrame({f"share, {name} pairs": share for name, share in first_share.items()})
table["true : placebo, first singular value"] = (ssd.spectrum[:, 0] / placebo.spectrum[:, 0]).numpy()
table.rename_axis("layer").round(2)

# %% [markdown]
# In the first layers, the placebo pairs reach as large a share. There, a large share means nothing, because the differences of any two
# requests lie along few directions. From layer 5 on, one direction carries far more of the true pairs than of the placebo pairs.
#
# ## Does it know about harm?
#
# Next comes a surprise. Swap harmful and harmless in every second pair, so that half of the labels are wrong, and compute both common
# estimators again: `ssd`, and the difference in means. `cosine` compares the first directions layer by layer.

# %%
texts = [(b.text, a.text) if i % 2 else (a.text, b.text) for i, (a, b) in enumerate(pairs)]
mixed = gl.collect(model.llm, gl.QueryPairs(*zip(*texts, strict=True)))
mean = directions.diff_in_means(fit)
agree = {"ssd, half swapped": ssd.cosine(directions.ssd(mixed)), "mean, half swapped": mean.cosine(directions.diff_in_means(mixed))}
agree |= {"ssd and mean": ssd.cosine(mean), "placebo, ssd and mean": placebo.cosine(directions.diff_in_means(placebo_fit))}
pd.DataFrame(agree).rename_axis("layer").round(2)

# %% [markdown]
# Wrong labels change only the sign of `ssd`: if some rows of A are negated, its right singular vectors stay the same. `ssd` finds the
# direction in which twins differ *most*; the labels only say which end is harmful. The difference in means needs correct labels, and with
# half of them swapped it loses its direction in the later layers. This makes a check: where both estimators agree (third column), the
# labels mark what twins differ in most. At layer 0 they don't agree, and for the placebo pairs, whose labels mean nothing, they agree less
# from layer 3 on.
#
# ## Is it stable?
#
# Other pairs would have given another direction. `select` takes some of the queries, or resamples them (a pair that is drawn twice counts
# twice). The harmful queries of the pairs come first, then their twins in the same order.

# %%
n, rng = len(pairs), np.random.default_rng(0)


def of_pairs(chosen, activations=fit):
    return directions.ssd(activations.select(np.concatenate([chosen, chosen + n])))


def spread(run, cosines, used):
    low, middle, high = np.quantile(torch.stack(cosines).numpy(), [0.025, 0.5, 0.975], axis=0)
    return pd.DataFrame({"metric": "cosine", "run": run, "layer": fit.layers, "value": middle, "low": low, "high": high, "n": used})


# %% [markdown]
# How much does the direction change under a bootstrap of the pairs? Do two halves that share no pair agree? How many pairs would have been
# enough? Bands are 95 % ranges over the draws.

# %%
halves = [(order[:50], order[50:]) for order in (rng.permutation(n) for _ in range(60))]
stability = [
    spread("bootstrap", [ssd.cosine(of_pairs(rng.integers(n, size=n))) for _ in range(60)], n),
    spread("two halves", [of_pairs(one).cosine(of_pairs(other)) for one, other in halves], 50),
    *(spread(f"{size} pairs", [ssd.cosine(of_pairs(rng.permutation(n)[:size])) for _ in range(40)], size) for size in (4, 16)),
]
axes = plots.layer_curves(pd.concat(stability), titles={"cosine": "Cosine of directions from other pairs (n: pairs)"})

# %% [markdown]
# The table has the same values as numbers, and the bootstrap of the placebo pairs:

# %%
again = spread("placebo, bootstrap", [placebo.cosine(of_pairs(rng.integers(n, size=n), placebo_fit)) for _ in range(60)], n)


def as_table(rows):
    texts = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in rows[["value", "low", "high"]].to_numpy()]
    return rows.assign(shown=texts).pivot_table(index="layer", columns="run", values="shown", aggfunc="first", sort=False)


as_table(pd.concat([*stability, again]))

# %% [markdown]
# From layer 5 on, four pairs already give about the direction of a hundred, and halves agree. At layer 0 even the sign is a matter of
# chance. But look at the last column: the placebo's cosines are close to 1 or to −1. Every resample finds the same line, and only its sign
# is random. Stability says that there is something to find. It doesn't say what.
#
# ## Is it one direction, or one per layer?
#
# `ssd[5]` has the direction of layer 5 at every layer, so that `cosine` compares layers.

# %%
pd.DataFrame({f"layer {layer}": ssd.cosine(ssd[layer]) for layer in fit.layers}).rename_axis("layer").round(2)

# %% [markdown]
# From layer 5 on it is nearly the same direction: what one layer writes stays in the residual stream. It has little in common with the
# direction of layer 0.
#
# ## Does it separate requests that it has not seen?
#
# We test on the validation split, in text and beside a grey image. Beside `ssd` stand the difference in means, the placebo, and the second
# wrong direction: 200 *random* ones. We take the AUROC without its sign, as we would if we chose the sign.

# %%
queries, grey = gl.organism.queries("validation"), gl.presentations.blank("grey")
in_text, beside_grey = gl.collect(model.llm, queries), gl.collect(model, queries, grey)


def measured(measure, found, run):
    return np.array([abs(measure(along.numpy(), run.harmful)) for along in found.coordinates(run)[:, :, 0].T])


def either_sign(scores, labels):
    return max(value := separability.auroc(scores, labels), 1 - value)


# %% [markdown]
# Look at the last two columns first.

# %%
random = [directions.random(ssd, seed) for seed in range(200)]
by_chance = np.stack([measured(either_sign, one, in_text) for one in random])
columns = {
    f"{name}, {run.presentation}": measured(either_sign, made, run)
    for name, made in {"ssd": ssd, "mean": mean}.items()
    for run in (in_text, beside_grey)
}
columns |= {"placebo, text": measured(either_sign, placebo, in_text), "random, median": np.median(by_chance, axis=0)}
pd.DataFrame({**columns, "share of random above 0.9": (by_chance > 0.9).mean(axis=0)}).rename_axis("layer").round(2)

# %% [markdown]
# The safety direction separates unseen requests almost perfectly from layer 5 on. And so does about every second random direction! The two
# classes are so far apart there that most views of them show it. An AUROC near 1 is no evidence for *this* direction; it would be a finding
# only where random ones fail. The distance between the classes in standard deviations (d′) is a stricter measure:

# %%
apart = np.stack([measured(separability.d_prime, one, in_text) for one in random])
low, middle, high = np.quantile(apart, [0.025, 0.5, 0.975], axis=0)
chance = pd.DataFrame(
    {"metric": "d_prime", "run": "random, 200 draws", "layer": fit.layers, "value": middle, "low": low, "high": high, "n": 216}
)
found = gl.compare(in_text, beside_grey, ssd).frame.query("metric == 'd_prime'")
axes = plots.layer_curves(pd.concat([found, chance]), titles={"d_prime": "d′ of the classes along the direction, size"})

# %% [markdown]
# Bands are 95 % intervals over queries; for the random directions, the band is the range of 95 % of them, in text. In the early layers the
# safety direction is one among many. In the later layers it lies above what random directions reach in text, but not by much.
#
# ## Does the model use it?
#
# A direction may show a difference that the model doesn't use. So we add it to the state of the last token and see whether the model
# refuses more. `gl.sweep` adds it at each layer in turn; its placebos add random directions of the same length. The placebo pairs'
# direction is a second intervention.

# %%
prompts = gl.keep(model, queries, grey)
options = {"scores": [gl.scores.refusal_logodds], "strengths": [4.0]}
effect = gl.sweep(model, {"safety direction": iv.add(ssd), "of placebo pairs": iv.add(placebo)}, prompts, placebos=0, **options)
control = gl.sweep(model, iv.add(ssd), prompts, placebos=20, **options)

# %% [markdown]
# Random directions push up as often as down, and their mean would hide that. So the line is the median of the draws, and the band reaches
# from the lowest draw to the highest.

# %%
draws = control.frame.query("variant != 'edit'").assign(change=lambda rows: rows["value"] - rows["base"])
means = draws.groupby(["label", "layer", "variant"], sort=False)["change"].mean().groupby(["label", "layer"], sort=False)
curves = effect.summary().assign(
    metric=lambda rows: rows["label"], run=lambda rows: rows["intervention"], value=lambda rows: rows["change"]
)
band = means.agg(value="median", low="min", high="max").reset_index()
curves = pd.concat(
    [curves, band.assign(metric=band["label"], run="random, 20 draws", n=band["label"].map({"harmful": 72, "harmless": 144}))]
)
titles = {label: f"{label} requests: Δ refusal log-odds (nats)" for label in ("harmful", "harmless")}
axes = plots.layer_curves(curves, titles=titles)

# %% [markdown]
# The table has the numbers of the harmful requests, with their bands, and the cosine of the two directions:

# %%
as_table(curves[curves["label"] == "harmful"]).assign(cosine=ssd.cosine(placebo).numpy().round(2))

# %% [markdown]
# From layer 1 on, adding the safety direction makes the model refuse more, harmless requests included, and no random direction of the same
# length comes near. So the model uses it. But the direction of the placebo pairs does nearly the same, up to its sign, which is a matter of
# chance. The last column says why: it *is* nearly the same line. In this model, whose main decision is whether to refuse, even harmless
# requests differ most in how close to a refusal they are. Our wrong direction was not so wrong; it lacked only the size of the differences
# and the sign.
#
# This is what each check could reject here:
#
# | check | placebo pairs | random |
# | --- | --- | --- |
# | a large first share of the spectrum | pass in early layers, fail later | not applicable |
# | a stable line over resamples of the pairs | pass | not applicable |
# | a stable sign over resamples | fail | not applicable |
# | agreement with the difference in means | weaker | not applicable |
# | AUROC near 1 on unseen requests, in late layers | pass | about every second one passes |
# | adding it moves refusal | pass up to the sign | fail |
#
# So trust the *line* from layer 5 on: it is stable, its differences are larger than those of other pairs, and the model uses it. Don't
# trust a name for it. The name "direction of harm" would say that it carries harm and nothing else, and no check above shows that.
#
# ## What this can't tell
#
# The organism has 128 dimensions and one decision to make, so almost any view shows the two classes, and almost any pairs show the line. In
# a model with thousands of dimensions and many decisions, random directions should do worse and placebo pairs should find something else.
# That is an expectation, not a result, and the same cells can be run there. All pairs use one template, so nothing here says that the
# direction holds for requests in other words.
#
# ## Try next
#
# *Does it hold for other wording?* Ask the same split in another template, with the same direction:
#
# ```python
# other = gl.organism.queries("validation", template=2)
# gl.compare(gl.collect(model.llm, other), gl.collect(model, other, grey), ssd).plot(["auroc", "d_prime"])
# ```
#
# *Is a second direction worth it?* `directions.ssd(fit, rank=2)` has two, and `ssd.plot()` showed how little the second carries. Use
# `coordinates(in_text)[:, :, 1]` to see whether it separates anything.
#
# *Do you have a vector from elsewhere?* `directions.from_vectors(vector, model=model.id)` makes directions of it, which can go through the
# same checks ([use a direction of my own](../how-to/hooks.md)).
#
# More: [`directions`](../api/directions.md), [`compare` and its metrics](../api/separability.md), [`sweep`](../api/sweep.md), and
# [tutorial 3](3_layer_sweep.md), which sweeps with a purpose.
