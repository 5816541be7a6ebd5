"""What a checkpoint remembers, saving, finding and loading it."""

import logging
from typing import Any

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns of what is not read, and raises errors, too

# "model_state", "optimizer_state" and "step"; "ema_state" when an average is kept, "skipped" when updates may be.
State = dict[str, Any]
