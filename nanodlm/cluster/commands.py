"""Running `sbatch`, `kubectl` and their kind, and reading what they say."""

import subprocess

from nanodlm.errors import NanodlmError


def _run(command: list[str], text: str = "", seconds: float = 60) -> tuple[int, str, str]:
    """Run a program: its exit code, what it said, and its errors; 127 when it is not there, 124 when it hangs."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return 127, "", f"{command[0]} is not there"
    except PermissionError:
        return 126, "", f"{command[0]} may not be run"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not answer within {seconds:.0f} s"
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def _told(program: str, arguments: list[str], text: str, remedy: str) -> str:
    """What a scheduler's program says to a job.

    Raises:
        NanodlmError: When it is not there, or refuses.
    """
    code, said, error = _run([program, *arguments], text)
    if code == 127 and not said:
        raise NanodlmError(f"there is no program {program} here: {remedy}, or print the job with --dry-run")
    if code:
        raise NanodlmError(f"{program} did not take the job: {_last(error) or f'exit code {code}'}")
    return said


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
