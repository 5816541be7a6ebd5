"""What a checkpoint remembers, saving, finding and loading it."""
