"""A run: the step, the loop around it, its checkpoints and its folder."""
