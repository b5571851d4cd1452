"""Static merges: one new checkpoint from several. Pure functions of tensors, streamed key by key or applied in memory."""
