"""Adapters of peft on a parallelized model: rules derived from those of the layers that they stand on."""
