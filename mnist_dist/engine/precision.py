"""Names of the precisions that a network can be computed in. Imports nothing heavy."""

PRECISION_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""Value of `mixed_precision` -> name for readers."""
