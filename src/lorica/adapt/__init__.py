"""Putting adapters into a model and taking them out, choosing what trains, and merging into shared weights."""
