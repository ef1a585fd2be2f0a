"""The masked autoencoder, its attention, and its weights in other formats."""
