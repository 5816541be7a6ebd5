"""A judge of the Hugging Face hub: any causal language model of `transformers`, with its own tokenizer, in PyTorch.

    hf:NAME[@REVISION]   of the hub, as hf:gpt2-large or hf:OWNER/NAME@COMMIT; `main` by default, or the cache's offline
    hf:FOLDER            a folder in that format, which begins with `/`, `.` or `~`

What is scored: a text stands behind the model's mark of a beginning (of an end, where it has no other, as GPT-2), so
that its first token is scored too. End-of-text marks in it become the model's own, and are read but not scored. So do
MDLM (arXiv:2406.07524) and Duo (arXiv:2506.10892), whose rows begin with a mark: their generative perplexity is e to
the mean nats of all tokens, under GPT-2 large, with 1,024 tokens of context. SEDD (arXiv:2310.16834) has no mark before
a text, whose first token is not scored, and takes the mean of the texts' own perplexities.
"""

from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from jaxtyping import Float, Int

from nanodlm.config import SampleConfig
from nanodlm.errors import Emit, NanodlmError, UsageError, counted
from nanodlm.store import fingerprint_of
from nanodlm.store.disk import sha256_of
from nanodlm.store.retry import one_line

FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # that are read of a model's on the hub
TEXT = "We, the People of 13 States"  # that a tokenizer must give back
WINDOW, MANY = 1024, 500  # tokens of context, where a model names no limit; and texts, below which MAUVE says little


def check(options: SampleConfig) -> None:
    """Refuse a judge whose packages are not installed, or whose files are not to be found."""
    extras = ["transformers", *(["mauve"] if options.mauve else [])]
    if missing := [package for package in ("torch", *extras) if find_spec(package) is None]:
        remedy = f"pip install -c constraints.txt -e '.[{','.join(extras)}]'"
        raise UsageError(f"{options.judge} needs {' and '.join(missing)}: {remedy}")
    identity(options)


def identity(options: SampleConfig) -> dict[str, Any]:
    """Return what determines a judgement: the judge's name and commit on the hub, or the sha256 of a folder's files."""
    folder, name = _folder(options.judge, ["config.json"]), options.judge[3:].partition("@")[0]
    if name[0] not in "/.~":
        return {"mauve": options.mauve, "judge": name, "bytes": folder.name}
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json of a model: name a folder that has, or hf:OWNER/NAME of the hub")
    files = {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file()}
    return {"mauve": options.mauve, "judge": "", "bytes": fingerprint_of(files)}


def _folder(judge: str, files: list[str]) -> Path:
    """Return the folder of a judge; of the hub's files, it has those that are asked for at least."""
    from huggingface_hub import constants, snapshot_download

    name, _, revision = judge[3:].partition("@")
    if name.startswith(("/", ".", "~")):
        return Path(judge[3:]).expanduser()
    which: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": "*/*", "revision": revision or None}
    try:
        return Path(snapshot_download(name, **which))
    except Exception as error:  # whatever a server may send
        with suppress(Exception):
            return Path(snapshot_download(name, local_files_only=True, **which))
        remedy = "check its name, the network and HF_TOKEN, or name a folder"
        raise NanodlmError(f"cannot fetch {judge} from {constants.ENDPOINT}: {one_line(error)}; {remedy}") from error


class HubJudge:
    """A model that reads the texts of an encoding in tokens of its own, in float32, on a GPU if there is one."""

    def __init__(self, options: SampleConfig, encoding: tiktoken.Encoding):
        """Load a model, of safetensors alone, without code of its own; one that sees what follows is refused."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name, folder = f"{options.judge} ({identity(options)['bytes'][:12]})", _folder(options.judge, FILES)
        how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **how)
            how |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            model, told = AutoModelForCausalLM.from_pretrained(folder, **how)  # type: ignore[misc]
        except Exception as error:  # whatever a folder may hold
            raise NanodlmError(f"cannot load {self.name}: {one_line(error)}") from error
        self._model: Any = model.train(False).to("cuda" if torch.cuda.is_available() else "cpu")
        self._encoding, self._end = encoding, self._tokenizer.eos_token_id
        self._window = getattr(model.config, "max_position_embeddings", None) or WINDOW
        one, other = (self._read([0, 1, 2, last])[0][:3] for last in (3, 0))
        if told["missing_keys"] or self._end is None or not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
            needs = "a model that reads from left to right, with all of its weights and an end-of-text mark"
            raise UsageError(f"{self.name} cannot judge: it takes {needs}")
        ids = self._tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        kept = self._tokenizer.decode(ids).lower().split() == TEXT.lower().split()
        if not kept or len(self._tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise UsageError(f"{self.name} cannot judge: its tokenizer is not there, or loses text, or is not its own")

    def _read(self, ids: list[int]) -> tuple[Any, Any]:
        """Return the logits and the last hidden states at each place of a row, (L, V) and (L, D)."""
        import torch

        with torch.inference_mode():
            row = torch.tensor([ids], device=self._model.device)
            read = self._model(row, use_cache=False, output_hidden_states=True)
        return read.logits[0].float(), read.hidden_states[-1][0].float()

    def ids(self, tokens: Int[np.ndarray, "T"]) -> list[int]:
        """Return tokens of the encoding in the model's: what looks like a mark is text, and bytes may be U+FFFD."""
        end, found = self._encoding.eot_token, []
        how = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        for part in np.split(tokens, np.flatnonzero(tokens == end) + 1):
            found += self._tokenizer(self._encoding.decode(part[part != end].tolist()), **how)["input_ids"]
            found += [self._end] * int(end in part)
        return found

    def nats(self, tokens: Int[np.ndarray, "T"], given: int) -> Float[np.ndarray, "_"]:
        """Return -log p of each scored token of a text behind its first tokens, which are given.

        A text that is longer than the model's context is read in windows that overlap by half.
        """
        begin, nats = self._tokenizer.bos_token_id, []
        before = [self._end if begin is None else begin, *self.ids(tokens[:given])]
        row = before + self.ids(tokens[given:])
        for first, end in pairwise([1, *range(self._window, len(row), self._window // 2), len(row)]):
            part = row[max(0, end - self._window) : end]
            logits = self._read(part)[0][:-1]
            nats += (logits.logsumexp(1) - logits[range(len(logits)), part[1:]]).tolist()[first - end :]
        return np.array(nats[len(before) - 1 :])[np.array(row[len(before) :]) != self._end]

    def mauve(self, sets: list[list[Int[np.ndarray, "_"]]], emit: Emit) -> dict[str, Any]:
        """Return MAUVE of samples and of real texts, the first and the last of three sets, against other real texts.

        It compares clusters of the last hidden states at the last tokens (arXiv:2102.01454, arXiv:2212.14578): 1 for
        equal sets, 0.004 for such as share no cluster.
        """
        from mauve import compute_mauve

        if (count := min(map(len, sets))) < MANY:
            few = f"{counted(count, 'texts')} are few for MAUVE, which is published of 5,000"
            emit("message", text=f"{few}: read it beside that of real text, or raise --sample.num_samples")
        rows = [[self.ids(text)[: self._window] or [self._end] for text in some[:count]] for some in sets]
        samples, others, real = (np.stack([self._read(row)[1][-1].cpu().numpy() for row in some]) for some in rows)
        found = [float(compute_mauve(p_features=others, q_features=of).mauve) for of in (samples, real)]
        told = {"mauve_features": self.name, "mauve_texts": count}
        return {"gen_mauve": found[0], "held_out_gen_mauve": found[1], **told}
