"""The backends: thin adapters between a call's tensors and what computes."""
