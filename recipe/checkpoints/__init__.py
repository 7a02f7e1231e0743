"""Weights ↔ disk. Begin with save.py."""
