"""Keeping stores well: verify, repair, collect, copy, adopt."""
