"""Start vLLM servers, with the plug-in or stock, and build the small model that runs on a CPU."""
