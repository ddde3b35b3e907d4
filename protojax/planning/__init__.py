"""What a compiled step will cost, read off the compiled program before any chip runs it."""
