"""Fixes for Streaming, Composer and W&B. Each file says the fault, its version, its source, and when to delete it."""
