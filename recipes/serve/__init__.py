"""Load on `msd serve`, and the same requests one after another with `transformers` (docs/serve.md)."""
