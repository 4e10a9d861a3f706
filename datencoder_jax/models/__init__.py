"""Flax NNX modules under Hugging Face names: the UNet, the autoencoder, CLIP's towers and the layers they share."""
