"""Model families, one folder each."""

from fastav.compatibility import require_tested

require_tested("torch", "transformers")
