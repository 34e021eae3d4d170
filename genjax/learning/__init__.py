"""From a model to a trained one: the step, its transforms, optimisers, sharding, checkpoints, the
loop.
"""
