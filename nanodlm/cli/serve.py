"""The command that gives a trained model a page on loopback."""

import contextlib
import logging
import socket
from types import FrameType
from typing import Annotated

from typing_extensions import Doc

from nanodlm.checkpoints.finding import find_model
from nanodlm.cli.arguments import Output
from nanodlm.cli.models import Model, short
from nanodlm.cli.store import OpenStore
from nanodlm.errors import UsageError

Port = Annotated[int, Doc("Port on 127.0.0.1; 0 takes any that is free.")]


def serve(model: Model = "", /, *, port: Port = 8000, store: OpenStore, console: Output) -> None:
    """Write texts on a page in the browser, and for scripts at /v1/completions."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or "it must be between 0 and 65535"
            raise UsageError(f"cannot listen on port {port}: {said}: choose another --port, or 0 for any") from error
        import uvicorn

        from nanodlm.checkpoints.loading import load
        from nanodlm.generation.service import make_app
        from nanodlm.generation.texts import Writer

        address = find_model(model, store)
        name = model if model and "/" not in model else short(address)
        app = make_app(Writer(*load(address)), name)
        taken.listen(128)
        console.text(f"{name} is at http://127.0.0.1:{taken.getsockname()[1]} (Ctrl-C ends it)")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, access_log=False)
        server = uvicorn.Server(config)
        stop = server.handle_exit

        def ends(sig: int, frame: FrameType | None) -> None:
            app.state.turns.ended = True  # so that texts under way fail in a line
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # those that are left are no fault
            stop(sig, frame)

        server.handle_exit = ends
        with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
            server.run(sockets=[taken])
