"""What a checkpoint remembers, saving, finding and loading it."""

from typing import Any

# "model_state", "optimizer_state" and "step"; "ema_state" when an average is kept, "skipped" when updates may be.
State = dict[str, Any]
