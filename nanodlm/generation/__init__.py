"""Texts from a trained model."""
