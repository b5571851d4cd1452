"""Ways of combining models while sampling, without training: what an ensemble is compared with. Importing this package costs nothing."""
