"""Compiled products and attention for CPU. Nothing here knows a model, a weight leaf or a cache."""
