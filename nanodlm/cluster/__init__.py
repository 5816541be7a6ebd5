"""Stages as jobs of Slurm or Kubernetes."""
