"""Measures of collapse, and the only place that names and judges them.

`summary` measures arrays, `verdict` says what the measures mean; neither needs a run of protojax.
"""

from protojax.metrics.measures import summary
from protojax.metrics.verdicts import verdict

__all__ = ["summary", "verdict"]
