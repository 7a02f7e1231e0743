"""Compute scores of (predictions, samples). Read gather.py first."""
