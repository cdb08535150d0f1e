"""Torch layer: model classes on core's blocks, context packing, checkpoints and LoRA maps. Knows no nodes."""
