"""Sources of images, the deterministic host pipeline, and on-device augmentation."""

from protojax.data.sources import CorruptImage, Source, build, require_labels

__all__ = ["CorruptImage", "Source", "build", "require_labels"]
