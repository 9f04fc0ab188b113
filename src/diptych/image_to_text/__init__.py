"""Turn pictures into words."""
