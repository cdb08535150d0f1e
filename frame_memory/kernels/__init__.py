"""Ops with a plain twin, backends whose needs are data, and the choice of one; no comfy, no models."""
