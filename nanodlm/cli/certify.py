"""The command that codes a text with a model, to its bound, and decodes it again."""

import math
import time
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.cli.arguments import Output
from nanodlm.cli.files import check_file, writing
from nanodlm.cli.models import Model, choose
from nanodlm.cli.score import is_text
from nanodlm.cli.store import OpenStore
from nanodlm.errors import UsageError

File = Annotated[str, Doc("Text to code, in UTF-8; by default the beginning, 100 kB, of what its run held out.")]
Decode = Annotated[str, Doc("Instead, decode a file that --out wrote."), arg(metavar="FILE")]
Out = Annotated[str, Doc("Where to write the coded file, or the decoded text."), arg(metavar="FILE")]
Steps = Annotated[int, Doc("Calls of the network a row; 0 is one a token, and fewer cost bits.")]


def certify(
    model: Model = "",
    file: File = "",
    /,
    *,
    store: OpenStore,
    decode: Decode = "",
    out: Out = "",
    steps: Steps = 0,
    seed: Annotated[int, Doc("Seed of the orders and of the bound's noise.")] = 0,
    console: Output,
) -> None:
    """Prove the bound of a text by coding it with a model, or decode it again."""
    if model and not file and is_text(model):
        model, file = "", model
    if file and decode:
        raise UsageError(f"name a text to code, or --decode a file, not both: {file} and {decode}")
    check_file(out)
    began, given = time.monotonic(), b""
    try:
        given = Path(decode or file).read_bytes() if decode or file else b""
    except OSError as error:
        raise UsageError(f"cannot read {decode or file}: {error.strerror}") from error
    if steps < 0 or not 0 <= seed < 2**31:
        raise UsageError("--steps and --seed must not be negative, nor --seed above 2147483647")
    from nanodlm.checkpoints.loading import load
    from nanodlm.evaluation import certificate

    address = choose(model, store)
    network, encoding = load(address)
    with console.showing("certify") as emit:
        if decode:
            written = certificate.decompress(network, encoding, given, emit)
            found = {"bytes": len(written)}
        else:
            tokens = certificate.tokens_of(encoding, given) if file else certificate.held_out(encoding, address)
            options = {"group": math.ceil(network.seq_len / (steps or network.seq_len)), "seed": seed}
            written, found = certificate.compress(network, encoding, tokens, **options, emit=emit)
    if out:
        with writing(out):
            Path(out).write_bytes(written)
    found |= {"seconds": round(time.monotonic() - began, 1)}
    if decode:
        console.text(f"{len(written):,} bytes, whose sha256 is that of what was coded")
    else:
        bits, ideal = found["bits_per_byte"], found["model_bits_per_byte"]
        console.text(
            f"text   {found['bytes']:,} bytes, {found['tokens']:,} tokens in {found['rows']:,} rows",
            f"file   {found['file_bytes']:,} bytes: {bits:.4f} bits per byte, header and coder {bits - ideal:.4f}",
            f"code   {ideal:.4f} bits per byte, -log p in the order that was drawn",
            f"bound  {found['bound_bits_per_byte']:.4f} ± {found['bound_bits_per_byte_stderr']:.4f} bits per byte",
        )
    console.json(model=address, **found)
