"""Measures of collapse, and the only place that names and judges them."""
