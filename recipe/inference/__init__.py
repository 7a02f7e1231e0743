"""Image → Prediction, for a program and for Python. Begin with detector.py."""
