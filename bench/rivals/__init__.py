"""Other decoders and loaders that ours are compared with."""
