"""What the benchmarks that count collectives share."""
