"""Methods: one file each, `make(config) -> base.Method`, found by name."""
