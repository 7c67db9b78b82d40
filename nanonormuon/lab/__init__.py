"""Experiments of many runs: races and trials, and their statistics."""
