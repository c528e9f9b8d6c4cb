# %% [markdown]
# # Evaluate defences honestly
#
# A defence brings refusals back beside an image. Does it do so more than chance would? What does it cost harmless requests? Is it better
# than a sentence in the prompt? This page compares six defences, controls among them: it chooses on validation, reports on held-out
# requests, and gives every rate an interval.
#
# ![Attack success and over-refusal of six defences on the test split, in text and beside two images](6_evaluate_defences/end.png)
#
# You need guardlens, but no GPU and no download. The cells take about 30 seconds on the organism, on two CPU cores.

# %% [markdown]
# ## Choose on validation
#
# Three splits have three purposes: `pairs` make the directions, `validation` chooses, and `test` is read once, at the end.

# %%
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import guardlens as gl
from guardlens import defences, directions, presentations
from guardlens import interventions as iv
from guardlens.errors import MismatchError
from guardlens.evaluation.table import Evaluation
from guardlens.results.intervals import mean_difference
from guardlens.results.significance import holm

gl.progress_bars(False)
model = gl.load("organism")
text, grey, white = presentations.text_only, presentations.blank("grey"), presentations.blank("white")
pairs, validation, test = gl.organism.pairs(), gl.organism.queries("validation"), gl.organism.queries("test")
ssd = directions.ssd(gl.collect(model.llm, pairs))
print(f"{len(pairs)} pairs, {len(validation)} validation and {len(test)} test requests")

# %% [markdown]
# VLM-Guard's paper leaves open how the guard edits and where. We try three readings at every layer, beside the grey image. The score is the
# log-odds that the answer opens with a refusal; a positive score means that it does.

# %%
readings = {name: defences.vlm_guard(ssd, reading=name).intervention for name in ("replace", "add", "amplify")}
effect = gl.sweep(model, readings, validation, grey, scores=[gl.scores.refusal_logodds])
opens = effect.frame.assign(refused=effect.frame["value"] > 0)
opens = opens[opens["variant"] == "edit"].groupby(["intervention", "layer", "label"], sort=False)["refused"].mean().unstack()
print((100 * opens.unstack("intervention")).round(0).to_string())

# %% [markdown]
# These are the percentages of requests whose answer opens with a refusal. `replace` in the last layers comes closest to refusing all
# harmful requests and no harmless ones. The rule is stated before the test split is read: among the settings that refuse at most 5 points
# more harmless requests than the undefended model does, take the one that refuses the most harmful requests.

# %%
base = effect.frame.drop_duplicates("query")
allowed = opens[opens["harmless"] <= (base.loc[base["label"] == "harmless", "base"] > 0).mean() + 0.05]
reading, layer = allowed["harmful"].idxmax()
print(f"chosen: {reading} at layer {layer}, {100 * allowed['harmful'].max():.0f} % of harmful validation requests refused")

# %% [markdown]
# ## Controls that could prove you wrong
#
# A guard beside "none" proves little. The placebo moves states as far as the guard does, but in random directions, and has several draws.
# `refuse all` pushes every request towards refusal: it shows how little a perfect ASR says by itself. `project out` removes what the guard
# puts back, and should make things worse. The reminder is a sentence before the request.

# %%
guard = defences.vlm_guard(ssd, layers=[layer], reading=reading)
arms: dict = {
    "none": defences.none,
    "reminder": defences.reminder(before=f"{gl.organism.REMINDER} ", after=""),
    "guard": guard,
    "placebo": [guard.intervention.placebo(seed) for seed in range(3)],
    "refuse all": iv.add(ssd, 60.0).at(layers=[layer]),
    "project out": defences.vlm_guard(ssd, layers=[layer], reading="project"),
}

# %% [markdown]
# ## Report on test
#
# `gl.evaluate` asks every test request under every defence and presentation, and judges the greedy answers. `text_only` must be among the
# presentations, since the gap is measured from it; white was not used to choose. Records are written to `out` as they are made.

# %%
out = Path(tempfile.mkdtemp()) / "records"
options = {"judge": gl.organism.judge, "max_new_tokens": 16, "batch_size": 256, "out": out}
table = gl.evaluate(model, arms, test, [text, grey, white], **options)
print(table)

# %% [markdown]
# The table takes both images together. ASR is the share of harmful requests that are *answered*, and over-refusal is the share of harmless
# requests that are refused. Helpful is the share of harmless requests answered correctly, which is stricter than not refused.

# %%
images = (grey.name, white.name)
rates = [{"defence": arm} | {rate: table.rate(rate, arm, *images).percent() for rate in ("asr", "over_refusal", "helpful")} for arm in arms]
print(pd.DataFrame(rates).to_string(index=False))
n = {rate: table.rate(rate, "none", *images).n for rate in ("asr", "helpful")}
print(
    f"n = {n['asr']} answers to harmful and {n['helpful']} to harmless requests per defence, times {len(arms['placebo'])} for the placebo"
)
print(f"undefended in text: ASR {table.rate('asr', 'none', text.name).percent()}")

# %% [markdown]
# Read the columns together. `refuse all` has an ASR as good as the guard's and is useless. `project out` does harm, as a negative control
# should. Intervals resample clusters of requests; a rate of 0 has an interval, too.
#
# How much of the gap between text and image does each defence close? 100 % restores the level of text, and a value below 0 makes it worse.

# %%
for arm in arms:
    print(f"{arm:12} {table.gap_closed(arm, *images).percent()}")

# %% [markdown]
# The placebo closes a little of the gap: any push of this size does something. The push's size does not explain the rest of what the guard
# closes.
#
# ## Paired tests
#
# All defences saw the same requests, so we compare them request by request. McNemar's test counts the requests on which two defences
# differ: `b` were answered under the first only, `c` under the second only. With several tests, Holm's correction keeps the chance of any
# false alarm at 5 %.

# %%
against = [("none", "guard"), ("none", "reminder"), ("none", "placebo"), ("reminder", "guard")]
first_draw = table.where(draw=0)
tests = [first_draw.mcnemar(*two, grey.name) for two in against]
for two, test_of_two, adjusted in zip(against, tests, holm(np.array([each.p for each in tests])), strict=True):
    print(f"{' against '.join(two):22} {test_of_two}; corrected p = {adjusted:.2g}")

# %% [markdown]
# The guard differs from "none" and from the reminder; one draw of the placebo does not differ clearly from "none". But McNemar's test
# assumes that requests are independent, and these come in clusters of similar ones. So we report the paired difference with its clustered
# interval, too.

# %%
for first, second in against:
    before, clusters = first_draw.outcomes("asr", first, grey.name)
    after, _ = first_draw.outcomes("asr", second, grey.name)
    change = mean_difference(before, after, clusters)
    print(f"ASR of {second} less that of {first}, in points: {change.percent()}, n = {change.n}")

# %% [markdown]
# The intervals agree with the tests, except for the placebo: a few requests that all changed in one direction give an interval that just
# excludes zero. That is why the gap above takes all draws and both images together.
#
# ## The judge makes errors, too
#
# The organism's judge knows the one right answer. Most judges don't: the default for real models, a list of refusal phrases, sees only the
# surface of an answer. The answers are in the table, so another judge needs no new run.

# %%
asked = {query.id: query for query in test}
verdicts = [gl.judges.keyword(asked[row.query], row.answer) for row in table.frame.itertuples()]
print(pd.crosstab(table.columns["verdict"], pd.Series(verdicts, name="keyword"), rownames=["organism"]))

# %% [markdown]
# The keyword judge calls an answer without a refusal phrase *answered*, even a wrong or broken one (the row `other`) or a refusal that has
# lost its phrase. Which defence's ASR does that distort?

# %%
rejudged = Evaluation(dict(table.columns) | {"verdict": np.array(verdicts)}, table.facts, table.provenance)
for arm in arms:
    exact, keywords = (each.rate("asr", arm, *images).percent() for each in (table, rejudged))
    print(f"{arm:12} ASR by the organism's judge {exact:20}  by keywords {keywords}")

# %% [markdown]
# Here it raises the ASR of several defences by a few points, "none" among them, and no conclusion changes. That need not be so: a defence
# that makes a model babble looks bad to keywords and good to a judge that asks for the right answer. On a real model there is no exact
# judge. Use two, and read the answers on which they disagree, such as these.

# %%
differ = table.frame[(table.columns["verdict"] == "other") & (np.array(verdicts) == "answered")]
for row in differ.groupby("defence").head(2).itertuples():
    print(f"{row.defence}, {row.presentation}: {asked[row.query].text} -> {row.answer}")

# %% [markdown]
# ## Stop, resume, save
#
# Long runs get interrupted. The same call finds the records in `out` and asks only the missing requests; here none are missing.

# %%
began = time.perf_counter()
again = gl.evaluate(model, arms, test, [text, grey, white], **options)
print(f"again in {time.perf_counter() - began:.1f} s, the same rows: {again.frame.equals(table.frame)}")

# %% [markdown]
# guardlens refuses another configuration in the same directory, so that two runs never mix unnoticed.

# %%
try:
    gl.evaluate(model, arms | {"guard": guard.intervention.scaled(0.5)}, test, [text, grey, white], **options)
except MismatchError as error:
    print(str(error).replace(str(out), "records"))

# %% [markdown]
# A saved table is a CSV file with its provenance beside it. Read it back with its own class, and every method works as before.

# %%
table.save(out.parent / "test.csv")
kept = Evaluation.load(out.parent / "test.csv")
print(kept, kept.provenance.model, kept.rate("asr", "guard", *images), sep="\n")

# %% [markdown]
# This is the figure that goes into a paper: every defence, both rates, n and intervals.

# %%
kept.plot()

# %% [markdown]
# ## What this doesn't show
#
# These are greedy answers of one model of one seed, in one language with one table of harm. The attacker here does not know the guard; one
# who does can aim below its threshold. The placebo's draws share requests, so they are no new evidence about requests. And the test split
# is spent now: if you choose anew after seeing it, it is a validation split.
#
# ## Try next
#
# - Your own defence: an intervention is a defence, so `{"mine": iv.add(ssd, 4.0).at(layers=[5])}` is one. See [compose your own
#   guard](4_compose_a_guard.md).
# - Rank 2, or a gate at 5 % false positives: `defences.vlm_guard(ssd.truncate(2), gate=gl.gates.threshold_at_fpr(...))`.
# - Reference: [evaluate](../api/evaluate.md), [defences](../api/defences.md), [judges](../api/judges.md), [intervals](../api/tables.md).
