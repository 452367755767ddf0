"""SLOs-Serve: an LLM serving scheduler in which every request carries its own latency promises."""

__version__ = "0.1.0"
