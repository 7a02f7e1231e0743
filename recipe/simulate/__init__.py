"""A run on many nodes, on paper. Begin with costs.py; the command is `__main__.py`."""
