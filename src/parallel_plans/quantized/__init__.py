"""Quantized weights that are split: each rank has its part of the integers, at the scale of the whole."""
