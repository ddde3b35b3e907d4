"""What `protojax evaluate` judges, and what its numbers are set beside."""
