"""Composer algorithms: what changes the training. Begin with nan_rollback.py."""
