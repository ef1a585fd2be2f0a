"""What the contrastive loss adds to what an encoder learns, by kind of mask."""
