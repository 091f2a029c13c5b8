"""The drawn world of demo and tests, and the training of its small SAM. Nothing of the product imports this."""
