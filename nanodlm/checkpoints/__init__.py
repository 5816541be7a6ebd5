"""What a checkpoint remembers, saving, finding and loading it."""

from typing import Any

State = dict[str, Any]  # what an update changes: model_state, optimizer_state, step, perhaps ema_state and skipped
