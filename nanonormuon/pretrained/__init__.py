"""Finished models: load, judge and export them."""
