"""The network: layers, what positions read, the transformer."""
