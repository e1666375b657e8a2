"""Video decoders: latents to pixels, a latent frame at a time."""
