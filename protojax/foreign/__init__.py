"""Weights of other libraries: their names, their shapes and their settings."""
