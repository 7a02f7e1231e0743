"""Batch → Outputs. Begin with network.py."""
