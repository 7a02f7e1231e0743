"""A model behind HTTP: `python -m recipe.serve MODEL`. Begin with app.py."""
