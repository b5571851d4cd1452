"""Where captioned images come from: folders, lists, parquet files, tar shards, the hub."""
