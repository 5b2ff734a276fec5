"""What the benchmarks of real time share: the cases, ranks that take turns, and what is told of them."""
