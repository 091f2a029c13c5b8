"""An image, or boxes on it, as features."""
