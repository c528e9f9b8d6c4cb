"""All that is measured, by name: each gives rows. Memory comes last: to weigh it changes how memory is handed out, and so speed."""

from collections.abc import Callable, Iterator

from analyses.benchmarks.answering import generation
from analyses.benchmarks.breakdown import where_time_goes
from analyses.benchmarks.collecting import collection, collection_memory, comparison, pools
from analyses.benchmarks.costs import imports, memory, overhead
from analyses.benchmarks.growing import growth, growth_memory
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
    "imports": imports,
    "where_time_goes": where_time_goes,
    "growth": growth,
    "collection_memory": collection_memory,
    "memory": memory,
    "growth_memory": growth_memory,
}
