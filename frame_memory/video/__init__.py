"""From latents to a file: windowed decode, blending, streamed writing with PyAV, and image sizing.

Nothing here ever holds a whole video as float pixels. Knows no nodes.
"""
