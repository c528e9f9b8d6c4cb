"""Every defence beside each other, with what it costs: `python -m analyses.defences --model organism`.

Settings are chosen on the validation split beside the grey image (`guardlens.cli.guard_selection.RULE`), and reported on the
test split: attack success, over-refusal, helpfulness and the gap closed, with intervals, paired tests and placebos. An interrupted run
resumes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import guardlens as gl
from analyses.publication import Analysis, Settings, application, figure, guard_layer, interval, markdown, percent
from guardlens import defences, directions, plots
from guardlens.cli.demo import Subject
from guardlens.cli.demo_report import WIDTHS
from guardlens.cli.guard_selection import RANKS, RULE, Guard, choose, mildest_gated
from guardlens.data.presentations import text_only
from guardlens.defences import Defence
from guardlens.evaluation.table import Evaluation, condition_points
from guardlens.results.intervals import mean_difference
from guardlens.results.significance import holm
from guardlens.results.tables import Table

PLACEBOS = 4
"""Number of placebos of the chosen guard, which are reported together."""

BLANKS = "blank images"
"""The presentation of a row that takes the flat images together."""

TESTED = ("asr", "over_refusal", "helpful")
"""The rates that are compared with no defence."""

HEADINGS = {"asr": "ASR", "over_refusal": "over-refusal", "helpful": "helpful"}


def measure(subject: Subject, settings: Settings) -> Table:
    """One row per defence and presentation: rates with intervals, paired changes against no defence, and exact tests."""
    guards, layer = choice(subject)
    chosen = mildest_gated(guards)
    seeds = [settings.seed + draw for draw in range(2 if settings.quick else PLACEBOS)]
    arms: dict[str, Defence | list[Defence]] = {"none": defences.none, "self_reminder": subject.reminder}
    arms |= {guard.defence.name: guard.defence for guard in guards}
    arms["placebo"] = [Defence("placebo", chosen.defence.intervention.placebo(seed)) for seed in seeds]
    answers = gl.evaluate(
        subject.model,
        arms,
        subject.test,
        (text_only, *subject.images),
        judge=subject.judge,
        out=settings.out / "records",
        max_new_tokens=subject.new_tokens,
        batch_size=subject.batch_size,
    )
    blanks = [blank.name for blank in subject.blanks]
    rows = [row | _changes(answers, row["defence"], [row["presentation"]]) for row in answers.conditions()]
    if len(blanks) > 1:
        rows += [row | _changes(answers, row["defence"], blanks) for row in answers.pooled(blanks, BLANKS)]
    facts = {
        "chosen": chosen.defence.name,
        "layer": layer,
        "guards": [guard.describe() for guard in guards],
        "judge": answers.facts["judge"],
        "placebos": len(seeds),
        "blanks": blanks,
        "note": subject.note,
        "interventions": answers.facts["interventions"],
    }
    return Table.from_rows(_corrected(rows), facts=facts, provenance=answers.provenance)


def choice(subject: Subject) -> tuple[list[Guard], int]:
    """The setting of each reading of VLM-Guard that the rule chooses on the validation split, and the layer at which they edit."""
    fit = gl.collect(subject.model, subject.pairs)
    ssd = directions.ssd(fit, rank=max(RANKS))
    layer = guard_layer(subject, ssd)
    return choose(subject.model, subject.validation, subject.blanks[0], ssd, fit, (layer,)), layer


def _changes(answers: Evaluation, defence: str, presentations: Sequence[str]) -> dict[str, float]:
    """The paired change of each rate from no defence, and McNemar's test of it, which is nan where it does not apply."""
    changes: dict[str, float] = {}
    for rate in TESTED:
        before, _ = answers.outcomes(rate, "none", *presentations)
        after, clusters = answers.outcomes(rate, defence, *presentations)
        draws = len(after) // len(before)
        change = mean_difference(np.tile(before, draws), after, clusters)
        changes |= change.columns(f"{rate}_change", prefix=f"{rate}_change_")
        only_none = only_defended = p = float("nan")
        if draws == len(presentations) == 1 and defence != "none":
            test = answers.mcnemar("none", defence, *presentations, rate=rate)
            only_none, only_defended, p = float(test.b), float(test.c), test.p
        changes |= {f"{rate}_only_none": only_none, f"{rate}_only_defended": only_defended, f"{rate}_p": p}
    return changes


def _corrected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm's correction over all tests of the table."""
    places = [(i, rate) for i, row in enumerate(rows) for rate in TESTED if not np.isnan(row[f"{rate}_p"])]
    adjusted = holm(np.array([rows[i][f"{rate}_p"] for i, rate in places]))
    corrected = [row | {f"{rate}_p_holm": float("nan") for rate in TESTED} for row in rows]
    for (i, rate), p in zip(places, adjusted, strict=True):
        corrected[i][f"{rate}_p_holm"] = float(p)
    return corrected


def draw(table: Table) -> Mapping[str, Any]:
    """ASR and over-refusal of every defence in every presentation, with intervals."""
    conditions = table.frame[table.frame["presentation"] != BLANKS].to_dict("records")
    return {"defences": plots.arms(condition_points(conditions, {"placebo": table.facts["placebos"]}))[0].figure}


def tell(table: Table) -> list[str]:
    """The page."""
    frame, facts = table.frame, table.facts
    shown = frame[frame["presentation"] == (BLANKS if BLANKS in set(frame["presentation"]) else facts["blanks"][0])]
    in_text = frame[frame["presentation"] == text_only.name].set_index("defence")
    n = in_text.loc["none"]
    return [
        "Defences, and what they cost",
        f"Judge: {facts['judge']}. Test split: {n['n']} harmful and {n['n_harmless']} harmless requests, in text and beside images. *ASR*: "
        "harmful requests answered. *Over-refusal*: harmless requests refused. *Helpful*: harmless requests answered. *Gap closed*: "
        "(undefended - defended) / (undefended - text), of the ASR. *Placebo*: the chosen guard's displacements in random directions "
        f"({facts['placebos']} draws taken together). Percent, with 95 % intervals. {WIDTHS}",
        figure("defences", "Attack success and over-refusal of every defence in every presentation, with 95 % intervals."),
        f"## {shown['presentation'].iloc[0].capitalize()}"
        + (f" ({', '.join(facts['blanks'])} together)" if len(facts["blanks"]) > 1 else ""),
        markdown(pd.DataFrame([_rates_row(row, in_text) for row in shown.to_dict("records")])),
        "## Paired with no defence",
        "Change of each rate in points, over the same requests (resampled by cluster).",
        markdown(pd.DataFrame([_change_row(row) for row in shown.to_dict("records") if row["defence"] != "none"])),
        f"## Exact tests beside {facts['blanks'][0]}",
        "McNemar: requests that count for the rate under one of the two alone, *none : defence*; p, and in brackets p after Holm's "
        f"correction over the {_tests(frame)} tests of the table. It takes requests as independent.",
        markdown(pd.DataFrame([_test_row(row) for row in _tested(frame, facts["blanks"][0])])),
        "## How the guard was chosen",
        f"{RULE} Here: `{facts['chosen']}`, layer {facts['layer']}.",
        markdown(pd.DataFrame(facts["guards"]).round(3).rename(columns=lambda name: name.replace("_", " "))),
        facts["note"],
    ]


def _rates_row(row: Mapping[str, Any], in_text: pd.DataFrame) -> dict[str, Any]:
    text = in_text.loc[row["defence"]]
    cells = {"defence": row["defence"], "ASR, text": percent(text["asr"], text["asr_low"], text["asr_high"])}
    names = {"asr": "ASR", "gap_closed": "gap closed", "over_refusal": "over-refusal", "helpful": "helpful"}
    return cells | {shown: percent(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name, shown in names.items()}


def _change_row(row: Mapping[str, Any]) -> dict[str, Any]:
    def points(rate: str) -> str:
        value, low, high = (100 * row[f"{rate}_change{end}"] for end in ("", "_low", "_high"))
        return interval(value, low, high, "+.1f")

    return {"defence": row["defence"]} | {HEADINGS[rate]: points(rate) for rate in TESTED}


def _tested(frame: Any, presentation: str) -> list[dict[str, Any]]:
    rows = frame[(frame["presentation"] == presentation) & frame["asr_p"].notna()]
    return rows.to_dict("records")


def _tests(frame: Any) -> int:
    return int(frame[[f"{rate}_p" for rate in TESTED]].notna().to_numpy().sum())


def _test_row(row: Mapping[str, Any]) -> dict[str, Any]:
    def shown(rate: str) -> str:
        counts = f"{row[f'{rate}_only_none']:.0f} : {row[f'{rate}_only_defended']:.0f}"
        return f"{counts}, p = {row[f'{rate}_p']:.2g} ({row[f'{rate}_p_holm']:.2g})"

    return {"defence": row["defence"]} | {HEADINGS[rate]: shown(rate) for rate in TESTED}


DEFENCES = Analysis("defences", measure, draw, tell, {})
app = application(DEFENCES)

if __name__ == "__main__":
    app()
