"""Several data sets in one run: joined into one manifest, and dealt by weight."""
