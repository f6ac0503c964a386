"""Datasets, metrics and the working model: how good a candidate is."""
