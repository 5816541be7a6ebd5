"""One update, the loop around it, the optimizer, records and trackers."""
