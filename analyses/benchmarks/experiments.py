"""All that is measured, by name: each gives rows. Memory comes last: to weigh it changes how memory is handed out, and so speed."""

from collections.abc import Callable, Iterator
from functools import partial

from analyses.benchmarks.answering import generation
from analyses.benchmarks.breakdown import where_memory_goes, where_time_goes
from analyses.benchmarks.collecting import collection, collection_memory, comparison, pools
from analyses.benchmarks.costs import imports, memory, overhead
from analyses.benchmarks.growing import growth, growth_memory
from analyses.benchmarks.reading import grids, layer_maps, memories, of_checkpoint, of_random, overheads
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
    "real_layers": partial(of_random, layer_maps),
    "real_grid": partial(of_random, grids),
    "real_overhead": partial(of_random, overheads),
    "smollm2_layers": partial(of_checkpoint, layer_maps),
    "smollm2_grid": partial(of_checkpoint, grids),
    "growth": growth,
    "collection_memory": collection_memory,
    "memory": memory,
    "where_memory_goes": where_memory_goes,
    "growth_memory": growth_memory,
    "real_memory": partial(of_random, memories),
    "smollm2_memory": partial(of_checkpoint, memories),
}
