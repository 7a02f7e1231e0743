"""Outputs → named, unweighted loss terms. Begin with detection.py."""
