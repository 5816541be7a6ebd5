"""Keeping stores well: verify, repair, collect, copy.

Throughout this room, `artifacts` are pairs of stage and fingerprint in the order of the pipeline, so that what others
were made from comes first, and `emit` is called as `emit(kind, **fields)` with progress.
"""
