"""One file an op: shapes, bytes, FLOPs and providers."""
