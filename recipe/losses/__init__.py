"""Outputs → named, unweighted loss terms. Begin with terms.py."""
