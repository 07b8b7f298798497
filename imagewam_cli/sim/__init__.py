"""Simulators: the contract, rollouts, recording, and the embedded environment `tabletop`."""
