"""Public test tools: vLLM's real scheduler and KV-cache manager on an imaginary device, in virtual time.

``scheduler.make_scheduler`` builds a scheduler of any class for a configuration, ``dry_engine.DryEngine`` drives it
as vLLM's engine core does, ``device.DryDevice`` stands in for the workers and checks what they are sent. A request's
features (grammar, LoRA adapter, remote KV, images, streaming input) are in ``request.RequestFeatures``.
"""
