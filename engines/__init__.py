"""CLIP in the forms that the scorers need. Imports kernels, and nothing else of the project."""
