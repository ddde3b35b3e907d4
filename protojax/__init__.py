"""protojax: self-supervised vision pretraining with prototypes, in JAX."""

__version__ = "0.1.0"
