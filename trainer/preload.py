"""What the fork server imports before it forks workers: everything that takes long.

Importing must not start threads or touch an accelerator, so nothing here is called.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # megatron-core warns that Transformer Engine and Apex are absent, once per import.
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.parallel_state
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.tensor_parallel.random

    import trainer.loop

__all__ = ["megatron", "trainer"]
