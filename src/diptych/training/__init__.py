"""Teach networks: what every recipe and fine-tuning shares."""
