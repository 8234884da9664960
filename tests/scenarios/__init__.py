"""Well-known samples of other engines, written as flows: see README.md."""
