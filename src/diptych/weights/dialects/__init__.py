"""Hold one naming scheme of published files each."""
