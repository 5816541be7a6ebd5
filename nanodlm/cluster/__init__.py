"""Stages on other machines: Slurm jobs and Kubernetes JobSets, followed through the store.

The job runs the same `nanodlm train` as this machine would, and is told the fingerprints of its inputs. Whoever waits
for it looks into the store: the lease of what is being built tells how far it is, and the manifest that it is done. The
scheduler is asked now and then, so that a job that failed or was cancelled is noticed. Nothing here imports JAX.
"""
