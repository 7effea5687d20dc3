"""The output projection and the cross-entropy of its logits as one operation."""
