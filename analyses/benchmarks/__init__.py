"""What guardlens costs, as ratios in one run against the naive way and against peers: `python -m analyses.benchmarks --out DIR`."""
