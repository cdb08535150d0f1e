"""The journal: finished sections on disk, enough to resume, re-roll or branch. Knows torch, never comfy or nodes."""
