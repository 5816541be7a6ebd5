"""The table of stages, and running one: look up, else build; here or in a process of its own.

What its functions take: `config`, the settings of the run; `store`, where artifacts lie; `inputs`, the artifacts that a
stage reads, by stage, or their fingerprints where another process is told them; `rebuild`, whether to build even though
the artifact exists, so that it may also be damaged; and `emit`, called as `emit(kind, **fields)` with what a person may
want to see: a `message` (text), or `progress` (done, total, unit and more). An artifact whose files are missing or have
other sizes than its manifest says raises `Damaged`, and a lacking one a `NanodlmError` with the command that builds it.
"""
