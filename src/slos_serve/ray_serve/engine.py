"""Ray Serve LLM's vLLM engine with two things left out that a replica here does without."""

from __future__ import annotations

from typing import Any

from slos_serve.ray_serve import compat


class SLOEngine(compat.VLLMEngine):
    """One process less on a CPU: Ray asks for an executor process, which one worker does not need and which a profile
    that ``slos-serve profile`` measured has no part of."""

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        parallel = vllm_engine_config.parallel_config
        if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class NothingToDownload(compat.CallbackBase):
    """For a model that is a folder: Ray's task that would download it takes as long to start as the engine."""

    async def on_before_node_init(self) -> None:
        """Leave it out."""
        self.ctx.run_init_node = False
