"""Flax NNX modules without losses, and the one adapter that turns them into pure functions."""
