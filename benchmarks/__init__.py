"""Measurements and the synthetic world they are made on."""
