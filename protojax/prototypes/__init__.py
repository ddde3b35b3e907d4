"""What a set of prototypes is, and how it moves."""

from protojax.prototypes import assignment, kmeans, mixture, prototype_set

__all__ = ["assignment", "kmeans", "mixture", "prototype_set"]
