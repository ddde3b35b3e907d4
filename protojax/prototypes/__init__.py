"""What a set of prototypes is, and how it moves."""
