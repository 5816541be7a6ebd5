"""The bound of held-out text under a model, and the report."""
