"""The model: weights, activations, interventions, sparse autoencoders. The only package that imports torch."""
