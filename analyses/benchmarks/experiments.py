"""All that is measured, by name: each gives rows."""

from collections.abc import Callable, Iterator

from analyses.benchmarks.answering import generation
from analyses.benchmarks.breakdown import where_time_goes
from analyses.benchmarks.collecting import collection, comparison, pools
from analyses.benchmarks.costs import imports, memory, overhead
from analyses.benchmarks.growing import growth
from analyses.benchmarks.rows import Plan, Row
from analyses.benchmarks.sweeping import answers, everywhere, prefixes, sweeps, tokens

ALL: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "sweeps": sweeps,
    "tokens": tokens,
    "everywhere": everywhere,
    "answers": answers,
    "prefixes": prefixes,
    "collection": collection,
    "pools": pools,
    "comparison": comparison,
    "generation": generation,
    "overhead": overhead,
    "memory": memory,
    "imports": imports,
    "where_time_goes": where_time_goes,
    "growth": growth,
}
