"""The parts of verify-resume: runs that are killed, and what they leave."""
