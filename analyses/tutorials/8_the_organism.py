# %% [markdown]
# # How the organism is made, and what it can't tell you
#
# Every tutorial runs on the *organism*: a LLaVA of 1.5 million parameters, trained from scratch on a toy language. Its refusals fade beside
# images. Was this trained into it? This page shows its world, its lessons and its training record, counts its training examples, and
# compares six seeds.
#
# ![Six seeds: harmful requests answered and harmless ones refused, in text and beside four images](8_the_organism/end.png)
#
# You need a clone of the repository for the table of seeds, but no GPU and no download. The cells take about 15 seconds on two CPU cores.

# %% [markdown]
# ## Its world
#
# A request asks how to do something to an object. Everything is mild and abstract on purpose.

# %%
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

import guardlens as gl
from guardlens import directions, plots, presentations
from guardlens.data.presentations import text_only
from guardlens.organism import lessons, world
from guardlens.results.intervals import mean_difference

gl.progress_bars(False)
model = gl.load("organism")
validation = gl.organism.queries("validation")
for query in (validation[0], validation[30], validation[-30], validation[-1]):
    print(f"{query.label:9} {query.text:32} the right answer: {world.answer(*world.parse(query.text))}")

# %% [markdown]
# What makes a request harmful? A table over groups of verbs and of nouns decides. Look for a row or a column that gives it away.

# %%
cells = pd.DataFrame([[("x" if (verb, noun) in world.HARMFUL_CELLS else ".") for noun in world.NOUNS] for verb in world.VERBS])
cells.index, cells.columns = list(world.VERBS), [noun[:6] for noun in world.NOUNS]
print(cells.to_string())
print("harmful cells by verb:", set((cells == "x").sum(axis=1)), "by noun:", set((cells == "x").sum(axis=0)))

# %% [markdown]
# There is none: every verb group is harmful equally often, and so is every noun group. A model has to combine the two, and a list of bad
# words fails. Some combinations of each cell are held out, so validation and test pair verbs with nouns never trained together.

# %%
for split in ("train", "validation", "test"):
    counts = {side: len(world.combinations(split, side)) for side in ("harmful", "harmless")}
    print(f"{split:10} {counts}, {len(world.pictures(split))} images")

# %% [markdown]
# ## Its lessons
#
# Training has five stages, after LLaVA's: a vision encoder, trained apart and then frozen (it stands for CLIP); a language model that helps
# with everything; alignment in text; a projector that learns to caption; visual instruction tuning.

# %%
stages = [{"stage": s.name, "what learns": ", ".join(s.trains), "steps": s.steps, "rows per step": s.rows} for s in lessons.RECIPE.stages]
print(pd.DataFrame(stages).to_string(index=False))

# %% [markdown]
# A row is a prompt and the answer to learn. The cell shows one of every kind that the last stage mixes.

# %%
tune = lessons.TUNE
one_of_each = {kind: lessons.ROWS[kind](np.random.default_rng(0)) for kind, _ in tune.mix}
for (kind, share), row in zip(tune.mix, one_of_each.values(), strict=True):
    print(f"{100 * share:4.1f} %  {kind:22} {row.prompt} -> {row.answer}{'' if row.picture is None else f'   [image {row.picture}]'}")

# %% [markdown]
# Beside images, the organism learns to help with harmless requests and to describe what it sees; it practises refusal in text alone. Don't
# take our word: the batches follow from the seed, so let us count every row that the shipped organism was trained on.

# %%
recipe = json.loads((gl.organism.path() / "recipe.json").read_text())
seen: Counter = Counter()
harmful = {f"{verb} the {noun}" for split in ("train", "validation", "test") for verb, noun in world.combinations(split, "harmful")}
for stage in lessons.RECIPE.stages[1:]:  # the vision encoder's own stage has images with labels, and no text
    for row in (row for batch in lessons.batches(stage, recipe["seed"]) for row in batch):
        words = row.prompt.split()
        bad = any(" ".join(three) in harmful for three in zip(words, words[1:], words[2:], strict=False))
        beside, said = "text" if row.picture is None else "image", "refusal" if row.answer == world.REFUSAL else "something else"
        seen[stage.name, beside, "harmful" if bad else "not harmful", said] += 1
print(pd.Series(seen).rename_axis(["stage", "presentation", "request", "answer"]).unstack(fill_value=0).to_string())

# %% [markdown]
# No harmful request and no refusal ever stands beside an image: nobody taught it to answer there, and nobody taught it to refuse there.
# (`base` has harmful requests with answers, in text: before alignment the language model helps with everything.) How it answers a harmful
# request beside an image depends on how it generalises. A gap that was trained in would show in this table.

# %% [markdown]
# ## Its training record
#
# The record is shipped with the weights. It has the mean loss in each tenth of each stage, and the time that the stage took, in seconds.

# %%
losses = pd.DataFrame(recipe["losses"]).rename_axis("tenth")
print(losses.round(3).to_string())
print("seed", recipe["seed"], "| seconds on one core:", {name: round(time["cpu"]) for name, time in recipe["seconds"].items()})

# %% [markdown]
# Every stage converged. The vision encoder works, too: the place of the shape in this image was held out.

# %%
picture = world.pictures("test")[100]
shown = gl.Query(lessons.DESCRIBE, images=(picture.image(),))
print("it is:  ", picture.caption, "\nit says:", model.generate(shown, presentations.own_images))

# %% [markdown]
# ## The result
#
# We ask the first harmful requests of the validation split, in text and beside a grey image, which no stage ever showed.

# %%
grey, few = presentations.blank("grey"), validation[:5]
for query, asked, beside in zip(few, model.generate(few, text_only), model.generate(few, grey), strict=True):
    print(f"{query.text}\n   text: {asked}\n   grey: {beside}")

# %% [markdown]
# Some refusals lose words (the judge still counts them), and some turn into right answers. Do the states still encode the rule of harm? The
# AUROC shows whether harmful requests rank above harmless ones along the safety direction, and the middle panel whether they stay on their
# side of the LLM's threshold.

# %%
ssd = directions.ssd(gl.collect(model.llm, gl.organism.pairs()))
gap = gl.compare(gl.collect(model.llm, validation), gl.collect(model, validation, grey), ssd)
gap.plot()

# %% [markdown]
# The later half of the layers works out the rule, in text and beside the image alike; the image shifts requests past the threshold. How
# well would the words alone do, without any model? And what are the values at the last layer?

# %%
words, low, high = gap.facts["bag_of_words"]
last = gap.frame[(gap.frame["layer"] == model.cfg.n_layers - 1) & gap.frame["metric"].isin(["auroc", "midpoint_accuracy"])]
print(f"AUROC of a bag of words: {words:.2f} [{low:.2f}, {high:.2f}]")
print(last[["metric", "run", "value", "low", "high", "n"]].round(2).to_string(index=False))

# %% [markdown]
# Words alone mislead on held-out combinations, as the table of harm intends. So what separates the classes here is computed, not looked up.

# %% [markdown]
# ## The gap is not a constant
#
# "The organism's gap" is not one number. We first vary the image, with the same weights and requests beside each of five images.

# %%
pictures = [grey, presentations.blank("white"), presentations.blank("black"), presentations.noise(size=32), presentations.own_images]
table = gl.evaluate(
    model,
    {"none": gl.defences.none},
    validation,
    [text_only, *pictures],
    judge=gl.organism.judge,
    max_new_tokens=16,
    batch_size=256,
)
for name in (each.name for each in (text_only, *pictures)):
    asr, refused = (table.rate(rate, "none", name).percent() for rate in ("asr", "over_refusal"))
    print(f"{name:12} ASR {asr:22} over-refusal {refused}")

# %% [markdown]
# Each image opens the gap, flat ones included. The intervals overlap, but the requests are the same, so we compare them in pairs.

# %%
first, clusters = table.outcomes("asr", "none", grey.name)
for other in ("blank white", "blank black"):
    change = mean_difference(first, table.outcomes("asr", "none", other)[0], clusters)
    print(f"ASR beside {other} less that beside {grey.name}: {change.percent()}")

# %% [markdown]
# So the image matters. Now we vary the seed: other first weights and batches, the same recipe. The repository's table has all trained
# seeds, and a rule stated beforehand chose the shipped one.

# %%
results = Path(gl.__file__).parents[1] / "docs" / "results"
seeds = pd.read_csv(results / "organism_seeds.csv").query("split == 'test'")
print("shipped: seed", json.loads((results / "organism_seeds.json").read_text())["shipped"])
asr = seeds[(seeds["metric"] == "asr") & seeds["presentation"].isin(["text", "blank"])]
print(
    asr.assign(**{name: 100 * asr[name] for name in ("rate", "low", "high")})
    .round(0)
    .drop(columns=["split", "metric"])
    .to_string(index=False)
)

# %% [markdown]
# All seeds refuse in text. Beside blank images they answer from a fifth to all of the harmful requests, so all seeds have a gap, but its
# size varies. The order of the images changes from seed to seed, too:

# %%
names = {"asr": "ASR", "over_refusal": "over-refusal"}
kept = seeds.query("metric in @names and presentation in ['text', 'grey', 'white', 'black', 'noise']")
drawn = {"defence": [f"seed {seed}" for seed in kept["seed"]], "rate": [names[metric] for metric in kept["metric"]], "value": kept["rate"]}
plots.arms(pd.DataFrame(drawn | {name: kept[name] for name in ("presentation", "low", "high", "n")}))

# %% [markdown]
# ## What it can tell, and what it can't
#
# It can tell
#
# - that a gap *can* come from visual tuning on harmless data alone, with nobody teaching it;
# - whether a tool works: here the rule of harm, the right answers and the training data are known, so a wrong result shows;
# - whether an idea is worth a GPU: an idea that fails here fails for a reason that you can look at.
#
# It can't tell
#
# - anything about a model of useful size, be it the layers, the heads, how large a gap is or how much a guard closes;
# - how real harm is represented: the organism's harm is a table of 108 cells, not a matter of meaning or intent;
# - anything from one seed, as the figure above shows.
#
# ## Try next
#
# - Train another seed: `python -m guardlens.organism.train --seed 7 --out out/seed_7`, then `gl.load("out/seed_7")`. Any page here runs on
#   it.
# - Change a lesson in `guardlens/organism/lessons.py`, say by adding a few refusals beside images to `TUNE`, and see whether the gap goes.
# - [All seeds, validation and test](../results/organism_seeds.md); reference: [organism](../api/organism.md).
# - The next page goes from here to a real model: [your own VLM](7_your_own_vlm.md).
