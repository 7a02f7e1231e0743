"""Predictions → the judges of others. Begin with tasks.py."""
