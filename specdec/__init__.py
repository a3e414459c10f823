"""specdec: lossless speculative decoding, as a research report you can run."""
