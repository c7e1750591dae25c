"""The offline stage that makes members: tasks, fine-tuning, difficulty, losses, analysis (extra: export)."""

import cascade_rt  # noqa: F401 - turns telemetry off before anything here imports what has it

RECORD = "cascade_train.json"
"""In a member's folder: the training record."""

VALIDATION = "validation.jsonl"
"""In a member's folder: the examples held out of its training."""
