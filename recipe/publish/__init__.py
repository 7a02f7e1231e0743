"""Checkpoint → a folder that others load, describe and download. Begin with card.py."""
