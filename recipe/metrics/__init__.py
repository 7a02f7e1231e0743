"""(Predictions, Samples) → numbers. Begin with gather.py."""
