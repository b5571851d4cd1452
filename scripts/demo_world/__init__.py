"""Make the embedded world from nothing: scorer, text encoder, autoencoder, base and experts."""
