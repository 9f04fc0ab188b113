"""Turn words into pictures."""
