"""Speed, FLOPs and memory, measured."""
