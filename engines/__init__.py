"""CLIP engines for text-guided masks. None exists yet: masks are random or tube so far (see docs/decisions.md)."""
