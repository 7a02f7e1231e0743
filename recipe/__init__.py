"""The recipe: train, evaluate, predict and export. Begin with train.py, then schema.py, then README.md."""
