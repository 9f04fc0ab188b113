"""Networks only: one `nn.Module` and its config a file; no files, no device logic."""
