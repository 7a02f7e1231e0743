"""Fixes for Streaming, Composer and W&B. Each file states the fault, its version and source, and when to delete it."""
