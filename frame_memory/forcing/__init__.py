"""Training: flow-matching losses, gradients through core's blocks, the trainer loop."""
