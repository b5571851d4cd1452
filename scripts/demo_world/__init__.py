"""Make the embedded worlds: scorers, rewards, text encoders, autoencoder, bases and experts."""
