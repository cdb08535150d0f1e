"""Graph faces: each node reads its inputs, calls one thing of the library, and returns."""
