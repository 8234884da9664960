"""How long it takes until work goes on after a fault, measured with default settings: ``python -m tests.recovery``."""
