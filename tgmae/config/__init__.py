"""Configuration: frozen dataclasses, one file per room that reads them; `run` composes them."""
