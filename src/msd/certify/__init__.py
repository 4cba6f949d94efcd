"""The certificate of losslessness: token identity with `generate()`, and the distribution of sampled drafts."""
