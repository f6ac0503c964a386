"""Checkpoints, what their tensors mean, and recipes: what a merged model is made of."""
