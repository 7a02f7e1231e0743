"""Sample → Batch. Begin with stream.py."""
