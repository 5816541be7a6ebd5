"""Experiments that anyone can rerun from the repository's root; each file opens with its command."""
