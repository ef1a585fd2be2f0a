"""CLIP in the forms the scorers need. Imports nothing of tgmae but its types and configuration."""
