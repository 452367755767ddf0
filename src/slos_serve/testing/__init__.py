"""Public test tools: vLLM's real scheduler on an imaginary device, in virtual time."""
