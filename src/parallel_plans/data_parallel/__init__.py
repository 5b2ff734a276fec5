"""torch's `DistributedDataParallel` and `fully_shard` over the ranks that hold the same parts and see other batches."""
