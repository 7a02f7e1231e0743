"""Composer callbacks and loggers: what a run reports. Begin with table.py."""
