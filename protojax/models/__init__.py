"""Encoders and heads: linen modules, called only through `init` and `apply`."""
