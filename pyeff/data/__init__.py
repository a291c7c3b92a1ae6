"""Sequences to train on: sources of samples, packing, and the order in which they are visited."""
