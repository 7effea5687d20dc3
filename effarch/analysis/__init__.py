"""What goes on inside a trained model: sparsity, massive activations, attention sinks, use of depth."""
