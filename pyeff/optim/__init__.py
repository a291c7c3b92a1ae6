"""Optimizers whose states are small."""
