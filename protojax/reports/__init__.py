"""The parts of the page that `python -m protojax.report` writes."""
