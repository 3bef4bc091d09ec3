"""Real data: class-sorted uint8 images in an order that depends on their content alone."""

from .load import CHANGES, PLACES, SOURCES, SPECS, load_source
from .source import LabelledImages, Source, hold_out

__all__ = ["CHANGES", "PLACES", "SOURCES", "SPECS", "LabelledImages", "Source", "hold_out", "load_source"]
