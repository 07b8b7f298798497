"""Simulators: the contract, the rollout, recording, and the embedded `tabletop`."""
