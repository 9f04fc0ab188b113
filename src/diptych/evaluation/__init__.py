"""Measure captions and pictures against references."""
