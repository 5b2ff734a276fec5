"""What training a parallelized model takes besides gradients: random numbers of all ranks, master weights."""
