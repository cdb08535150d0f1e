"""The section loop around a stock guider, FramePack's sampler, prompts over time and guards."""
