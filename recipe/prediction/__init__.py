"""Outputs → Predictions, and what people see of them. Begin with decode.py."""
