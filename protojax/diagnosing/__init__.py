"""What `protojax doctor` and `protojax.diagnose` look at, opened and diagnosed."""
