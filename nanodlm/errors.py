"""The errors that users cause or can mend; each message says what is wrong and what to do, in one line."""


class NanodlmError(Exception):
    """Something failed for a reason that the message names; the command line exits with 1."""

    exit_code = 1


class UsageError(NanodlmError):
    """A bad flag, preset or setting; the command line exits with 2."""

    exit_code = 2


class Damaged(NanodlmError):
    """An artifact's files are not what its manifest says: missing, truncated, swapped or altered."""


class Unreachable(NanodlmError):
    """A storage did not answer for as long as it was asked; the same may succeed later."""


class Stopped(NanodlmError):
    """A signal ended the work after it was saved; running again continues. The command line exits with 75."""

    exit_code = 75
