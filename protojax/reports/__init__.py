"""The parts of the page that `protojax report` writes."""
