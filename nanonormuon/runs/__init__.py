"""Runs side by side: tables, pages, spectra."""
