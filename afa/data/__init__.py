"""Sources of captioned images: folders, lists, parquet files, tar shards, the hub."""
