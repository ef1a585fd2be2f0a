"""The masked autoencoder, its attention backends, and its weights in other formats."""
