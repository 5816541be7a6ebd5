"""The pipeline as Prefect flows: order, retries and reporting; all logic is in `nanodlm`."""
