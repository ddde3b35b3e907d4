"""Sources, the deterministic host pipeline, and on-device augmentation."""
