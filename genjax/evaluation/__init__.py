"""What a model is worth: estimates with their errors, figures about samples, and the classifier
that judges them.
"""
