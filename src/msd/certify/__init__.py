"""The certificate: token identity with `generate()`, and the distribution of sampled drafts."""
