"""Meshes of devices, how arrays are cut along them, and processes that train together."""
