"""From a formula to straight-line programs over activations."""
